"""Read a recipe: YAML, no key twice, changed by `KEY=VALUE`; an error names every wrong key and the nearest known."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from qlora_export.catalog import ARTIFACTS, FORMATS, require_known
from qlora_export.errors import InputError, UsageError
from qlora_export.recipe.calibration import CalibrationMethod, CalibrationPart, CalibrationRecipe
from qlora_export.recipe.config import (
    AUTO,
    ArtifactRecipe,
    DriftRecipe,
    Limits,
    Merge,
    Override,
    PublishRecipe,
    Recipe,
    WeightedAdapter,
    Yardstick,
)
from qlora_export.recipe.protocols import USUAL, choose_protocol


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and change keys by `KEY=VALUE`; raises UsageError naming every key that is wrong."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8-sig"), _UniqueKeys)  # noqa: S506  a SafeLoader
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe", "give the path of a YAML recipe") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: is a folder", "give the path of a YAML recipe") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML: {error}", "a recipe is a YAML mapping") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys, this is a {type(data).__name__}")
    return make_recipe(data, path.parent, str(path), settings)


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that is stated twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; raises ConstructorError at the second of two equal keys."""
        keys = [key.value for key, _ in node.value]
        if again := next((key for key, _ in node.value if keys.count(key.value) > 1), None):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {again.value!r} is there twice", again.start_mark
            )
        return super().construct_mapping(node, deep)


def make_recipe(data: dict[str, Any], folder: Path, origin: str, settings: Sequence[str] = ()) -> Recipe:
    """Validate recipe data that came from `origin`, a file or the flags; relative paths start at `folder`."""
    for setting in settings:
        _set(data, setting)
    if "adapter" in data and data["adapter"] is None:
        raise UsageError(
            f"{origin}: adapter is empty", "name its folder, or leave the key out to release the base alone"
        )
    try:
        if "folder" in data:
            raise UsageError(f"{origin}: unknown key folder", "paths are relative to the recipe's own folder")
        recipe = Recipe.model_validate({**data, "folder": folder})
    except ValidationError as error:
        messages, hints = zip(*(_explain(item) for item in error.errors()), strict=True)
        raise UsageError(f"{origin}: " + "; ".join(messages), " ".join(dict.fromkeys(h for h in hints if h))) from None
    for artifact in recipe.artifacts:
        require_known([*ARTIFACTS, AUTO], "format", artifact.format)
        for override in artifact.overrides.values():
            require_known(FORMATS, "format", override.format)
    if recipe.drift is not None:
        choose_protocol(recipe.drift.protocol or USUAL, recipe.drift.window_tokens, recipe.drift.stride_tokens)
    return recipe


def _set(data: dict[str, Any], setting: str) -> None:
    """Put one `a.b.0.c=VALUE` into recipe data; VALUE is YAML."""
    key, equals, text = setting.partition("=")
    hint = "as in --set drift.limits.mean_kl=0.1 or --set artifacts.0.format=bf16"
    if not equals or not key:
        raise UsageError(f"--set {setting}: no KEY=VALUE", hint)
    *path, last = key.split(".")
    place: Any = data
    try:
        for step in path:
            place = place[int(step)] if isinstance(place, list) else place.setdefault(step, {})
        place[int(last) if isinstance(place, list) else last] = yaml.safe_load(text)
    except (AttributeError, IndexError, TypeError, ValueError, yaml.YAMLError):
        raise UsageError(f"--set {setting}: there is no such place in the recipe", hint) from None


def _explain(item: Any) -> tuple[str, str]:
    """One validation error as a message and a hint."""
    where = ".".join(str(step) for step in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _fields_at(Recipe, item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
        return f"unknown key {where}", f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
    if item["type"] == "missing":
        return f"{where} is missing", "every recipe names a base and at least one artifact"
    return f"{where}: {item['msg'].removeprefix('Value error, ')}", ""


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Known keys at a place in the recipe."""
    sections: dict[str, type[BaseModel]] = {
        "merge": Merge,
        "adapter": WeightedAdapter,
        "artifacts": ArtifactRecipe,
        "overrides": Override,
        "calibration": CalibrationRecipe,
        "method": CalibrationMethod,
        "mixture": CalibrationPart,
        "drift": DriftRecipe,
        "limits": Limits,
        "no_worse_than": Yardstick,
        "publish": PublishRecipe,
    }
    for step in location:
        model = sections.get(step, model) if isinstance(step, str) else model
    return [name for name in model.model_fields if name != "folder"]
