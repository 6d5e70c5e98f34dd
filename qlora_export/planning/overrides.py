"""Which layers of an artifact have a format of their own: `overrides` of its recipe, the first pattern that matches."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping

from qlora_export.errors import UsageError
from qlora_export.formats.base import Format
from qlora_export.formats.mixed import mix
from qlora_export.planning.resolve import ResolvedFormat
from qlora_export.types import Rounding


def mixed(
    item: ResolvedFormat, main: Format, names: Mapping[str, tuple[str, ...]], rounding: Rounding = "nearest"
) -> Format:
    """The artifact's format with its overrides, for modules by stored name with the names that the live model has.

    Raises UsageError for formats that do not go together. An override is rounded as the artifact, where it can be.
    """
    if not item.overrides:
        return main
    forms: dict[str, Format] = {}
    for module in names:
        pattern = next((pattern for pattern in item.overrides if fnmatch.fnmatchcase(module, pattern)), None)
        if pattern is not None:
            forms[module] = item.rounded(item.overrides[pattern], rounding)
    return mix(main, forms, names)


def override_problems(item: ResolvedFormat, modules: Iterable[str]) -> list[str]:
    """What is wrong with the overrides of an artifact."""
    known = list(modules)
    unmatched = [pattern for pattern in item.recipe.overrides if not fnmatch.filter(known, pattern)]
    problems = [f"overrides: {pattern!r} matches no quantised module" for pattern in unmatched]
    error = item.override_error
    try:
        if item.error is None:
            mixed(item, item.form, {module: (module,) for module in known})
    except UsageError as found:
        error = found
    if error is not None:
        problems.append(f"overrides: {error.message}" + (f" ({error.hint})" if error.hint else ""))
    return problems
