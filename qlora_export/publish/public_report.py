"""What of a recipe and a report is published: everything that decides a byte or a verdict, nothing of the machine.

A local path becomes what the manifest calls its folder: `owner/name@commit` for a snapshot in the Hub's cache, else its
last name. Ids of the Hub stay as they are. Where the key lies that signs is nobody's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from qlora_export.recipe.config import Recipe
from qlora_export.sources.locate import hub_id, identity
from qlora_export.sources.text_tables import HUB_PREFIX

OF_THE_RUN = ("published", "exit_code")
OF_THE_MACHINE = ("path", "reused")
# What quotes the texts that drift was measured on.
OF_THE_TEXTS = ("worst",)
QUOTING = {"generation": "worst", "choices": "flipped", "labels": "flipped"}


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON data with local paths reduced to names, without its folder and without `publish.sign`."""
    data = recipe.model_dump(mode="json", by_alias=True)
    data["base"] = _source(recipe, recipe.base)
    if isinstance(recipe.adapter, str):
        data["adapter"] = _source(recipe, recipe.adapter)
    else:
        for item in data["adapter"] or ():
            item["path"] = _source(recipe, item["path"])
    if recipe.drift is not None:
        for key in ("text", "choices", "prompts"):
            data["drift"][key] = _text(data["drift"][key]) if data["drift"][key] else None
    if recipe.calibration is not None and recipe.calibration.text is not None:
        data["calibration"]["text"] = _text(recipe.calibration.text)
    for item in (data["calibration"] or {}).get("mixture", ()):
        item["text"] = _text(item["text"])
    if recipe.publish is not None:
        del data["publish"]["sign"]
        kind, _, place = recipe.publish.to.partition(":")
        if kind == "folder":
            data["publish"]["to"] = f"{kind}:{PurePosixPath(place).name}"
    reduced: dict[str, Any] = without_machine_paths(data)
    return reduced


def public_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report without where it was made, and without the texts: no paths, no receipts, nothing of this run alone."""
    kept = {key: value for key, value in report.items() if key not in OF_THE_RUN}
    kept["artifacts"] = [_public_artifact(artifact) for artifact in report.get("artifacts", ())]
    reduced: dict[str, Any] = without_machine_paths(kept)
    return reduced


def _public_artifact(artifact: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of an artifact, without the texts that findings quote."""
    kept = {key: value for key, value in artifact.items() if key not in (*OF_THE_MACHINE, *OF_THE_TEXTS)}
    for key, texts in QUOTING.items():
        if isinstance(found := kept.get(key), Mapping):
            kept[key] = {name: value for name, value in found.items() if name != texts}
    return kept


def without_machine_paths(value: Any) -> Any:
    """JSON data with every text that is an absolute or home path cut to its last name; infinity becomes a text."""
    if isinstance(value, Mapping):
        return {key: without_machine_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_machine_paths(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str) and value.startswith(("/", "~/")):
        return PurePosixPath(value).name
    return value


def _text(name: str) -> str:
    """A text's own name, without the folders it lies in; a data set of the Hub is named as it is."""
    return name if name.startswith(HUB_PREFIX) else PurePosixPath(name).name


def _source(recipe: Recipe, text: str) -> str:
    """A source as the manifest calls it, unless it is an id of the Hub."""
    return text if hub_id(text, recipe.folder) is not None else identity(recipe.path(text))
