"""A plan kept in a file, and the promise that a later run does exactly that.

`plan -o plan.json` keeps the recipe, the digest of every artifact's plan, and the sha256 of all that is read: base
weights, the adapter, the texts. `release plan.json` compares all of it, headers and texts before it builds, the
base's bytes as it reads them anyway, and refuses when one differs. Cost of keeping a plan: reading the base once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_export._version import __version__
from qlora_export.artifact import Artifact
from qlora_export.engine.source_digests import SourceDigests
from qlora_export.errors import InputError, Refused, UsageError
from qlora_export.planning.plan import Plan
from qlora_export.recipe.config import Recipe
from qlora_export.recipe.load import make_recipe

AGAIN = "plan again, look at what changed, and release the new plan"


def pins(plan: Plan, workers: int) -> dict[str, Any]:
    """What a kept plan holds beside its summary; raises UsageError when a measurement would have to decide first."""
    recipe = plan.recipe
    if recipe.merge.onto == "auto":
        raise UsageError(
            "merge.onto: auto is decided by measuring, so a plan cannot promise its result",
            "state as-trained or original to keep a plan",
        )
    return {
        "version": __version__,
        "folder": str(recipe.folder),
        "recipe": recipe.model_dump(mode="json", by_alias=True, exclude_unset=True),
        "pinned": {**_facts(plan), "base_files": _base_files(plan, workers)},
    }


def pinned_recipe(path: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a kept plan and its pins; raises InputError or UsageError when the file is none."""
    try:
        data = json.loads(path.read_bytes())
        found, folder, version = data["pinned"], Path(data["folder"]), data["version"]
        recipe = make_recipe(data["recipe"], folder, str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such plan", "make one with plan RECIPE -o plan.json") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"{path}: no plan that was kept by plan -o", "make one with plan RECIPE -o plan.json"
        ) from None
    if version != __version__:
        raise Refused(f"{path}: planned by version {version}, this is {__version__}", AGAIN)
    return recipe, found


def require_pinned(plan: Plan, pinned: Mapping[str, Any]) -> None:
    """Raise Refused naming the first thing that is not as it was planned."""
    for key, value in _facts(plan).items():
        if pinned.get(key) == value:
            continue
        if isinstance(value, dict):
            key = next(f"{key} {name}" for name in value if value[name] != (pinned.get(key) or {}).get(name))
        raise Refused(f"{key} is not as it was when the release was planned", AGAIN)


def require_pinned_bytes(artifacts: Iterable[Artifact], pinned: Mapping[str, Any]) -> None:
    """Raise Refused unless the artifacts were made from the very base files that were planned."""
    for artifact in artifacts:
        for name, facts in artifact.manifest["sources"]["base"]["files"].items():
            if pinned["base_files"] and pinned["base_files"].get(name) != facts:
                raise Refused(f"the base's {name} is not as it was when the release was planned", AGAIN)


def _facts(plan: Plan) -> dict[str, Any]:
    drift = plan.recipe.drift
    return {
        "recipe": plan.recipe.digest,
        "base": plan.checkpoint.headers_sha256,
        "adapter": plan.adapter.sha256 if plan.adapter else None,
        "artifact": {
            **{item.name: item.digest for item in plan.artifacts},
            **{item.name: item.digest for item in plan.exports},
        },
        "text": _sha256(plan.recipe.path(drift.text)) if drift else None,
        "assumptions": list(plan.assumptions),
    }


def _base_files(plan: Plan, workers: int) -> dict[str, Any]:
    """Digests of the weight files; none of those that are still on the Hub, which their commit pins."""
    if not all(path.is_file() for path in plan.checkpoint.files):
        return {}
    digests = SourceDigests(plan.checkpoint.files)
    digests.hash_all([path.name for path in digests.paths], workers)
    return dict(digests.facts)


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
