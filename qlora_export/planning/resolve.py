"""What each line of a recipe names: its format with the formats of single layers, or its exporter; made here only.

A line whose options are wrong is resolved without them and keeps the error, so that everything else about it can still
be checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_export import catalog
from qlora_export.errors import UsageError
from qlora_export.exporters.base import Exporter
from qlora_export.exporters.registry import load_exporter
from qlora_export.formats.base import Format
from qlora_export.formats.registry import load_format
from qlora_export.recipe.config import ArtifactRecipe, Recipe
from qlora_export.types import Rounding, TrainingQuantization


@dataclass(frozen=True)
class ResolvedFormat:
    """An artifact that a format makes; `dense` holds what the format leaves dense, `overrides` are by pattern."""

    recipe: ArtifactRecipe
    training: TrainingQuantization
    form: Format
    dense: Format
    overrides: Mapping[str, Format]
    error: UsageError | None = None
    override_error: UsageError | None = None

    def rounded(self, form: Format, rounding: Rounding) -> Format:
        """The format, or that of an override, with a rounding where it has that."""
        return form.rounded(rounding, self.training, self.recipe.seed) if rounding in form.roundings else form


@dataclass(frozen=True)
class ResolvedExport:
    """An artifact that an exporter makes, or what is wrong with its options."""

    recipe: ArtifactRecipe
    made: Exporter | UsageError

    @property
    def exporter(self) -> Exporter:
        """The exporter; raises UsageError where its options are wrong."""
        if isinstance(self.made, UsageError):
            raise self.made
        return self.made


ResolvedArtifact = ResolvedFormat | ResolvedExport


def resolve_artifacts(recipe: Recipe, training: TrainingQuantization) -> tuple[ResolvedArtifact, ...]:
    """Every line of a recipe, in its order; raises UsageError for a name that nothing has."""
    return tuple(resolve(item, training) for item in recipe.artifacts)


def resolve(item: ArtifactRecipe, training: TrainingQuantization) -> ResolvedArtifact:
    """One line of a recipe; raises UsageError for a name that nothing has."""
    if item.format in catalog.EXPORTERS:
        return ResolvedExport(item, _exporter(item))
    error = None
    try:
        form = load_format(item.format, training, item.options)
    except UsageError as found:
        form, error = load_format(item.format, training), found
    dense = load_format(catalog.DENSE_FORMATS[form.dense_dtype], training) if form.quantises else form
    try:
        overrides = {
            pattern: load_format(override.format, training, override.options)
            for pattern, override in item.overrides.items()
        }
    except UsageError as found:
        return ResolvedFormat(item, training, form, dense, {}, error, found)
    return ResolvedFormat(item, training, form, dense, overrides, error)


def _exporter(item: ArtifactRecipe) -> Exporter | UsageError:
    try:
        return load_exporter(item.format, item.options, item.rounding)
    except UsageError as error:
        return error
