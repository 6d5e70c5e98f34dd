"""A first recipe for a base and an adapter: YAML with a word on every key worth knowing.

What the files tell is filled in: the base's Hub id from `adapter_config.json`, the dense format from the base's dtype,
how the base was quantised in training from the sidecar. Paths are written as seen from the recipe's own folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from qlora_export.catalog import DENSE_FORMATS
from qlora_export.drift.gate import DEFAULT_LIMITS
from qlora_export.errors import InputError, UsageError
from qlora_export.recipe.load import make_recipe
from qlora_export.sources.adapter import CONFIG_NAME, Adapter, open_adapter
from qlora_export.sources.checkpoint import Checkpoint, open_checkpoint
from qlora_export.sources.locate import CACHE_FOLDER, COMMIT, HUB_ID, hub_id, identity, local_folder
from qlora_export.types import TORCH_NAMES

PLACEHOLDER = "REPLACE-ME.jsonl"


@dataclass(frozen=True)
class Start:
    """What is known before there is a recipe; paths as seen from the working folder, `folder` is the recipe's."""

    folder: Path
    base: str | None = None
    adapter: str | None = None
    to: str | None = None
    text: str | None = None


def first_recipe(start: Start) -> str:
    """The text of a recipe that loads; raises UsageError when no base is known, InputError when one is not there."""
    adapter = _opened_adapter(start.adapter)
    base = start.base or _trained_on(adapter)
    if base is None:
        raise UsageError("no base", "give --base, a folder or a Hub id, or an adapter that names its base")
    checkpoint = _opened_base(base)
    place = _pinned(_place(base, start.folder), adapter)
    is_folder = hub_id(place, Path()) is None
    text = _template().render(
        base=place,
        base_is_folder=is_folder,
        pinned=is_folder or "@" in place,
        base_id=_base_id(base, checkpoint, adapter),
        adapter=_place(start.adapter, start.folder) if start.adapter else None,
        training=adapter.training if adapter else None,
        recorded=adapter is not None and adapter.training.recorded,
        dense=_dense_format(checkpoint),
        text=_relative(start.text, start.folder) if start.text else None,
        placeholder=PLACEHOLDER,
        limits=DEFAULT_LIMITS,
        mark="" if start.to else "# ",
        to=start.to or "hub:owner/model-{name}",
    )
    make_recipe(yaml.safe_load(text), start.folder, "the new recipe")
    return text


def _template() -> Template:
    loader = PackageLoader("qlora_export.cli")
    # Text, and no markup; `scalar` writes a value as YAML reads it back.
    environment = Environment(  # noqa: S701
        loader=loader, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["scalar"] = _scalar
    return environment.get_template("recipe.yaml")


def _opened_adapter(text: str | None) -> Adapter | None:
    """The adapter of a folder; None for a Hub id, which is looked at by `plan`."""
    if text is None or hub_id(text, Path()) is not None:
        return None
    return open_adapter(local_folder(text, Path()))


def _opened_base(text: str) -> Checkpoint | None:
    if hub_id(text, Path()) is not None:
        return None
    return open_checkpoint(local_folder(text, Path()))


def _trained_on(adapter: Adapter | None) -> str | None:
    """The base that an adapter names: a folder that is there, or a Hub id."""
    named = adapter.config.get("base_model_name_or_path") if adapter else None
    if not isinstance(named, str) or adapter is None:
        return None
    if Path(named).is_dir() or HUB_ID.fullmatch(named):
        return named
    raise InputError(
        f"{adapter.folder / CONFIG_NAME}: the base {named!r} is no folder here and no Hub id", "give --base"
    )


def _base_id(base: str, checkpoint: Checkpoint | None, adapter: Adapter | None) -> str | None:
    """The base's Hub id for the card, where anything tells it; None where `base` says it already."""
    if checkpoint is None:
        return None
    if CACHE_FOLDER.fullmatch(Path(base).expanduser().name) or "@" in identity(checkpoint.folder):
        return identity(checkpoint.folder).partition("@")[0]
    named = adapter.config.get("base_model_name_or_path") if adapter else None
    if isinstance(named, str) and HUB_ID.fullmatch(named) and not Path(named).exists():
        return named
    return None


def _pinned(base: str, adapter: Adapter | None) -> str:
    """A Hub id with the commit that the adapter was trained on, where both are known."""
    config = adapter.config if adapter else {}
    revision = config.get("revision")
    known = config.get("base_model_name_or_path") == base and isinstance(revision, str) and COMMIT.fullmatch(revision)
    return f"{base}@{revision}" if known else base


def _place(text: str, folder: Path) -> str:
    """A source as the recipe names it: Hub ids as they are, paths as seen from the recipe's folder."""
    return text if hub_id(text, Path()) is not None else _relative(text, folder)


def _relative(text: str, folder: Path) -> str:
    """A path from a folder; absolute where nothing but the root is shared."""
    place, home = Path(text).expanduser().absolute(), folder.absolute()
    if len(Path(os.path.commonpath([place, home])).parts) == 1:
        return str(place)
    return os.path.relpath(place, home)


def _dense_format(checkpoint: Checkpoint | None) -> str:
    config: dict[str, Any] = dict(checkpoint.text_config) if checkpoint else {}
    named = config.get("dtype") or config.get("torch_dtype")
    dtype = next((dtype for dtype, name in TORCH_NAMES.items() if name == named), "BF16")
    return DENSE_FORMATS[dtype] if dtype == "F16" else "bf16"


def _scalar(text: str) -> str:
    """A string as YAML reads it back."""
    return yaml.safe_dump(text, width=10_000, allow_unicode=True).removesuffix("\n").removesuffix("\n...")
