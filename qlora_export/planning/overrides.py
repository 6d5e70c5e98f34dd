"""Which layers of an artifact have a format of their own: `overrides` of its recipe, the first pattern that matches."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import cast

from qlora_export.errors import UsageError
from qlora_export.formats.base import Format, RoundingFormat
from qlora_export.formats.mixed import mix
from qlora_export.formats.registry import load_format
from qlora_export.recipe.config import ArtifactRecipe, Override
from qlora_export.types import Rounding, TrainingQuantization


def overrides_of(item: ArtifactRecipe, modules: Iterable[str]) -> dict[str, Override]:
    """The override of each module that has one."""
    found: dict[str, Override] = {}
    for module in modules:
        for pattern, override in item.overrides.items():
            if fnmatch.fnmatchcase(module, pattern):
                found[module] = override
                break
    return found


def mixed(
    item: ArtifactRecipe,
    main: Format,
    training: TrainingQuantization,
    names: Mapping[str, tuple[str, ...]],
    rounding: Rounding = "nearest",
) -> Format:
    """The artifact's format with its overrides, for modules by stored name with the names that the live model has.

    Raises UsageError for formats that do not go together. An override is rounded as the artifact, where it can be.
    """
    if not item.overrides:
        return main
    forms: dict[str, Format] = {}
    for module, override in overrides_of(item, names).items():
        form = load_format(override.format, training, override.options)
        if isinstance(form, RoundingFormat) and rounding in form.roundings:
            form = form.rounded(rounding, training, item.seed)
        forms[module] = form
    return cast(Format, mix(main, forms, names))


def override_problems(item: ArtifactRecipe, modules: Iterable[str], training: TrainingQuantization) -> list[str]:
    """What is wrong with the overrides of an artifact."""
    if not item.overrides:
        return []
    known = list(modules)
    unmatched = [pattern for pattern in item.overrides if not fnmatch.filter(known, pattern)]
    problems = [f"overrides: {pattern!r} matches no quantised module" for pattern in unmatched]
    try:
        main = load_format(item.format, training, item.options)
        mixed(item, main, training, {module: (module,) for module in known})
    except UsageError as error:
        problems.append(f"overrides: {error.message}" + (f" ({error.hint})" if error.hint else ""))
    return problems
