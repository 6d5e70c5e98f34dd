"""Settling `format: auto`: the best format that the room and the runtime of an artifact allow, by a fixed rule.

    options: {adapters: true}    the runtime takes adapters: nf4-adapter, where training was in nf4; nothing is rounded
    options: {bits: 8}           room for 8 bits a weight: int8
    options: {bits: 4}           the default: nf4, calibrated where the recipe has a text to calibrate on

nf4 without a text has its usual rounding, which is dithered wherever rounding to nearest would lose the adapter. The
recipe that comes out names the format, and says why in the artifact's `why`, which goes to plan, manifest and card.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from qlora_export.errors import ExportError, UsageError
from qlora_export.merge.matching import match_adapter
from qlora_export.merge.trained_quantization import training_facts
from qlora_export.planning.open_sources import open_sources
from qlora_export.recipe.config import AUTO, ArtifactRecipe, Recipe
from qlora_export.types import Rounding

BITS = (4, 8)
KNOWN = "auto knows `options: {adapters: true | false, bits: 4 | 8}`"


@dataclass(frozen=True)
class _Choice:
    format: str
    rounding: Rounding | None
    why: str


def resolve_auto_formats(recipe: Recipe, out: Path) -> Recipe:
    """The recipe with a format for every `auto`; as it is where there is none. Raises UsageError for its options.

    Opens the adapter and the base, by their headers, where the answer depends on how the base was trained.
    """
    if all(item.format != AUTO for item in recipe.artifacts):
        return recipe
    trained_in = cache(partial(_trained_in, recipe, out))
    names = {item.name for item in recipe.artifacts}
    made = tuple(_settled(recipe, item, trained_in, names) for item in recipe.artifacts)
    return recipe.model_copy(update={"artifacts": made})


def _settled(recipe: Recipe, item: ArtifactRecipe, trained_in: Callable[[], str], names: set[str]) -> ArtifactRecipe:
    """One artifact with its format; named after it, unless it had a name or another has that one."""
    if item.format != AUTO:
        return item
    adapters, bits = _options(item)
    refused = ""
    if adapters and recipe.adapters:
        if (quantised := trained_in()) == "nf4":
            return _chosen(
                item, _Choice("nf4-adapter", None, "its runtime takes adapters, so nothing is rounded"), names
            )
        refused = f"its base was trained on as {quantised}, so the adapter cannot stay beside an nf4 base; "
    if bits == 8:
        choice = _Choice("int8", None, "8 bits a weight are allowed")
    elif recipe.calibration is not None:
        choice = _Choice("nf4", "calibrated", "4 bits a weight, and the recipe has a text to calibrate on")
    else:
        choice = _Choice("nf4", None, "4 bits a weight, and the recipe has no text to calibrate on")
    return _chosen(item, _Choice(choice.format, choice.rounding, refused + choice.why), names)


def _options(item: ArtifactRecipe) -> tuple[bool, int]:
    """Whether the runtime takes adapters, and how many bits a weight may have."""
    given: Mapping[str, Any] = item.options
    adapters, bits = given.get("adapters", False), given.get("bits", 4)
    unknown = sorted(set(given) - {"adapters", "bits"})
    if unknown:
        raise UsageError(f"artifact {item.name}: auto has no option {unknown[0]!r}", KNOWN)
    if not isinstance(adapters, bool) or isinstance(bits, bool) or bits not in BITS:
        raise UsageError(f"artifact {item.name}: auto cannot have adapters {adapters!r} and bits {bits!r}", KNOWN)
    if item.rounding is not None or item.overrides:
        what = "a rounding" if item.rounding is not None else "overrides"
        raise UsageError(f"artifact {item.name}: auto chooses the rounding, it cannot have {what}", "name the format")
    return adapters, bits


def _chosen(item: ArtifactRecipe, choice: _Choice, names: set[str]) -> ArtifactRecipe:
    usual = "-".join(part for part in (choice.format, choice.rounding) if part)
    name = usual if item.name == AUTO and usual not in names else item.name
    why = f"format auto: {usual}: {choice.why}"
    if item.why:
        why = f"{item.why}; {why}"
    changes: dict[str, Any] = {"format": choice.format, "rounding": choice.rounding, "options": {}}
    return item.model_copy(update={**changes, "name": name, "why": why})


def _trained_in(recipe: Recipe, out: Path) -> str:
    """How the base was quantised in training; nf4 where it cannot be told, and the plan says what is wrong."""
    try:
        sources = open_sources(recipe, out)
        if sources.checkpoint is None or sources.adapter is None:
            return "nf4"
        names = match_adapter(sources.adapter, sources.checkpoint).names
        return training_facts(sources.adapter, recipe.stated_training, names).live.quant_type
    except ExportError:
        return "nf4"
