"""What artifacts are planned from."""

from __future__ import annotations

import fnmatch
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from qlora_export.merge.merged_model import MergedModel
from qlora_export.merge.module_names import Names
from qlora_export.merge.trained_quantization import TrainingFacts
from qlora_export.planning.resolve import ResolvedArtifact, ResolvedExport, ResolvedFormat
from qlora_export.recipe.config import ArtifactRecipe, Recipe
from qlora_export.sources.adapter import Adapter
from qlora_export.sources.checkpoint import Checkpoint
from qlora_export.types import Onto, TrainingQuantization


@dataclass(frozen=True)
class Inputs:
    """What an artifact is planned from: the merged model, the base as it is, and what each line of the recipe names."""

    recipe: Recipe
    checkpoint: Checkpoint
    adapter: Adapter | None
    model: MergedModel
    unmerged: MergedModel
    facts: TrainingFacts
    names: Names
    artifacts: tuple[ResolvedArtifact, ...]

    @property
    def formats(self) -> tuple[ResolvedFormat, ...]:
        """The artifacts that formats make."""
        return tuple(item for item in self.artifacts if isinstance(item, ResolvedFormat))

    @property
    def exports(self) -> tuple[ResolvedExport, ...]:
        """The artifacts that exporters make."""
        return tuple(item for item in self.artifacts if isinstance(item, ResolvedExport))

    @property
    def training(self) -> TrainingQuantization:
        """How the base was quantised, by stored names."""
        return self.facts.stored.quantization

    def onto(self, item: ArtifactRecipe) -> Onto:
        """The merge base of one artifact; without an adapter there is nothing to merge, and the weights stay."""
        return self.recipe.onto(item) if self.adapter else "original"

    def encoded(self, item: ResolvedFormat) -> AbstractSet[str]:
        """The stored linear layers that a quantising format encodes: all that it can but those to keep."""
        return self.facts.encodable - {
            name for pattern in item.recipe.keep for name in fnmatch.filter(self.facts.encodable, pattern)
        }
