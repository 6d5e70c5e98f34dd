"""What artifacts are planned from."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_export.merge.merged_model import MergedModel
from qlora_export.merge.module_names import Names
from qlora_export.merge.trained_quantization import TrainingFacts
from qlora_export.recipe.config import ArtifactRecipe, Recipe
from qlora_export.sources.adapter import Adapter
from qlora_export.sources.checkpoint import Checkpoint
from qlora_export.types import Onto, TrainingQuantization


@dataclass(frozen=True)
class Inputs:
    """What an artifact is planned from: the merged model, and the base as it is."""

    recipe: Recipe
    checkpoint: Checkpoint
    adapter: Adapter | None
    model: MergedModel
    unmerged: MergedModel
    facts: TrainingFacts
    names: Names

    @property
    def training(self) -> TrainingQuantization:
        """How the base was quantised, by stored names."""
        return self.facts.stored.quantization

    def onto(self, item: ArtifactRecipe) -> Onto:
        """The merge base of one artifact; without an adapter there is nothing to merge, and the weights stay."""
        return self.recipe.onto(item) if self.adapter else "original"
