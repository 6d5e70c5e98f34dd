"""Opening what a recipe names: folders, cached snapshots and Hub ids; several adapters combined into one.

Of a Hub id the small files come first, then the headers over the network; weights are only downloaded when adapter and
base fit. The two steps are why opening takes a look at the match.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from qlora_export.errors import ExitCode, ExportError, Problem
from qlora_export.merge.combine import Weighted, combination_problems, combine
from qlora_export.merge.matching import match_adapter
from qlora_export.planning.disk_checks import place_problems
from qlora_export.planning.source_checks import base_problems
from qlora_export.recipe.config import Recipe
from qlora_export.sources.adapter import CONFIG_NAME, Adapter, adapter_config, is_lora, open_adapter, variant_problems
from qlora_export.sources.checkpoint import Checkpoint, open_checkpoint, read_json
from qlora_export.sources.locate import (
    commit_of,
    fetch_small_files,
    fetch_weights,
    hub_id,
    identity,
    local_folder,
    remote_tensors,
)

Found = TypeVar("Found")


@dataclass(frozen=True)
class Sources:
    """The opened base and the adapter, the adapters that it was combined from, and what was wrong.

    Without a checkpoint, or where an adapter that is named did not open, there are problems.
    """

    checkpoint: Checkpoint | None
    adapter: Adapter | None
    combined: tuple[Weighted, ...]
    problems: tuple[Problem, ...]


def open_sources(recipe: Recipe, out: Path) -> Sources:
    """Open base and adapters; every problem at once."""
    problems: list[Problem] = []
    places = [local_folder(text, recipe.folder) for text in recipe.sources if hub_id(text, recipe.folder) is None]
    problems += place_problems(out, places)
    items = []
    for stated in recipe.adapters:
        adapter = _attempt(partial(_open_adapter, stated.path, recipe.folder), problems)
        if adapter is not None:
            problems += variant_problems(adapter)
            items.append(Weighted(adapter, stated.weight))
    complete = len(items) == len(recipe.adapters) and all(is_lora(item.adapter) for item in items)
    several = len(recipe.adapters) > 1 or any(item.weight != 1 for item in items)
    adapter = items[0].adapter if items and complete and not several else None
    if several and complete:
        problems += combination_problems(items, recipe.merge)
        if not problems:
            adapter = _attempt(lambda: combine(items, recipe.merge, out), problems)
    if adapter is not None and not adapter.tensors and problems:
        # Its config alone was fetched, and is refused: no weight of it was downloaded.
        adapter, complete = None, False
    checkpoint = None
    if complete or hub_id(recipe.base, recipe.folder) is None:
        checkpoint = _attempt(lambda: _open_base(recipe, adapter, problems), problems)
    if checkpoint is not None and adapter is not None:
        problems += _revision_problems(adapter, checkpoint)
    return Sources(checkpoint, adapter, tuple(items) if several else (), tuple(problems))


def _attempt(make: Callable[[], Found], problems: list[Problem]) -> Found | None:
    try:
        return make()
    except ExportError as error:
        problems.append(Problem.of(error))
        return None


def _open_adapter(text: str, folder: Path) -> Adapter:
    remote = hub_id(text, folder)
    if remote is None:
        return open_adapter(local_folder(text, folder))
    place = fetch_small_files(*remote)
    config = Adapter(place, adapter_config(place), {})
    if variant_problems(config):
        return config
    return open_adapter(fetch_weights(remote[0], place.name))


def _open_base(recipe: Recipe, adapter: Adapter | None, problems: list[Problem]) -> Checkpoint:
    remote = hub_id(recipe.base, recipe.folder)
    if remote is None:
        return open_checkpoint(local_folder(recipe.base, recipe.folder))
    place = fetch_small_files(*remote)
    if not any(place.glob("*.safetensors")):
        config = read_json(place / "config.json")
        seen = Checkpoint(place, config, remote_tensors(remote[0], place.name, place), ())
        if not config.get("quantization_config"):
            problems += base_problems(seen)
            problems += match_adapter(adapter, seen).problems if adapter is not None else ()
        if problems:
            return seen
    return open_checkpoint(fetch_weights(remote[0], place.name))


def _revision_problems(adapter: Adapter, checkpoint: Checkpoint) -> list[Problem]:
    """A base at another commit than the one that the adapter's config names."""
    stated, found = adapter.config.get("revision"), commit_of(checkpoint.folder)
    if found is None or not isinstance(stated, str) or len(stated) != len(found) or stated == found:
        return []
    message = f"{adapter.folder / CONFIG_NAME}: trained on revision {stated}, the base is {identity(checkpoint.folder)}"
    return [Problem(ExitCode.BAD_INPUT, message, f"give the base at that revision: @{stated}")]
