"""What a plan holds: the route of every tensor, the layout of every file, and what is known of each artifact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_export.exporters.base import Exporter
from qlora_export.formats.base import Format
from qlora_export.merge.base_rows import Training
from qlora_export.merge.companion_files import CompanionFile, merged_config
from qlora_export.merge.merged_model import MergedModel, Output
from qlora_export.planning.open_sources import Sources
from qlora_export.planning.rounding import RoundingChoice
from qlora_export.recipe.config import ArtifactRecipe, Recipe
from qlora_export.sources.adapter import Adapter
from qlora_export.sources.checkpoint import Checkpoint
from qlora_export.sources.weights import Weight
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.layout import Layout
from qlora_export.types import MergeBase, Onto, Part, TensorSpec, TrainingQuantization


@dataclass(frozen=True)
class Route:
    """The way of one tensor into one artifact: the format that encodes it, or None when its bytes are copied.

    `base` is what changes are made to; a layer that is dithered has another than its artifact is merged onto.
    """

    output: Output
    form: Format | None
    base: MergeBase = "as-trained"

    @property
    def turned(self) -> bool:
        """Whether the layer's [out, in] goes back to the [in, out] it is stored in; a quantising format does not."""
        return self.output.transposed and self.form is not None and not self.form.quantises

    @property
    def spec(self) -> TensorSpec:
        """The tensor that the format sees."""
        return self.output.spec if self.turned else self.output.layer_spec


@dataclass(frozen=True)
class Made:
    """Parts whose bytes were decided before the build, by name, and what the manifest tells of how."""

    parts: Mapping[str, StoredTensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 of the facts, which tell the error of every layer to the last bit: other bytes, other facts."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ArtifactPlan:
    """One artifact to the byte."""

    recipe: ArtifactRecipe
    rounding: RoundingChoice
    onto: Onto
    routes: Mapping[str, Route]
    layout: Layout
    carried: tuple[CompanionFile, ...]
    digest: str
    made: Made = field(default_factory=Made)

    @property
    def name(self) -> str:
        """Name of the artifact and of its folder."""
        return self.recipe.name

    @property
    def form(self) -> Format:
        """The format that encodes its layers."""
        return self.rounding.form

    @property
    def file_bytes(self) -> dict[str, int]:
        """All files but the manifest, and their sizes."""
        shards = {shard.file: shard.bytes for shard in self.layout.shards}
        return shards | {file.name: file.bytes for file in self.carried}

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all files but the manifest, sorted."""
        return tuple(sorted(self.file_bytes))

    @property
    def bytes(self) -> int:
        """Size of the folder without its manifest."""
        return self.layout.total_bytes + sum(file.bytes for file in self.carried)


@dataclass(frozen=True)
class ExportPlan:
    """One artifact that an exporter makes from another or from the adapter; bytes are estimates."""

    recipe: ArtifactRecipe
    exporter: Exporter
    source: ArtifactPlan | None
    bytes: int
    working_bytes: int
    digest: str

    @property
    def name(self) -> str:
        """Name of the artifact and of its folder."""
        return self.recipe.name

    @property
    def source_name(self) -> str:
        """What it is made from: a dense artifact's name, or the adapter."""
        return self.source.name if self.source else "the adapter"


@dataclass(frozen=True)
class Plan:
    """What a build will do; `training` speaks of stored modules, `live_training` of those of the live model.

    `assumptions` are choices that nobody stated, `library_bytes` what the process takes before it works.
    """

    recipe: Recipe
    opened: Sources
    model: MergedModel
    training: Training
    live_training: TrainingQuantization
    artifacts: tuple[ArtifactPlan, ...]
    exports: tuple[ExportPlan, ...]
    assumptions: tuple[str, ...]
    library_bytes: int

    @property
    def checkpoint(self) -> Checkpoint:
        """The base."""
        if self.opened.checkpoint is None:
            raise ValueError("a plan has a base")
        return self.opened.checkpoint

    @property
    def adapter(self) -> Adapter | None:
        """The adapter, or what several were combined into."""
        return self.opened.adapter

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json as the finished model has it in 16 bits; a key that it drops is None."""
        return merged_config(self.checkpoint.config, "bfloat16", self.model.settings)

    @property
    def bytes(self) -> int:
        """Size of all artifacts together."""
        return sum(self.sizes.values())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is predicted to go wrong, and what would do better."""
        found = (item.rounding.warning(item.name) for item in self.artifacts)
        return tuple(text for text in found if text is not None)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every artifact by name, those of exports estimated."""
        return {item.name: item.bytes for item in self.artifacts} | {item.name: item.bytes for item in self.exports}

    @property
    def sources(self) -> tuple[Weight, ...]:
        """Every stored weight that an artifact is made from, the base's in their order before the adapter's."""
        found = {id(weight): weight for weight in self.checkpoint.weights.values()}
        for artifact in self.artifacts:
            found |= {id(route.output.source): route.output.source for route in artifact.routes.values()}
        return tuple(found.values())

    def from_adapter(self, source: Weight) -> bool:
        """Whether a weight was saved with the adapter."""
        return self.checkpoint.weights.get(source.spec.name) is not source


def route_parts(route: Route) -> tuple[Part, ...]:
    """The parts that a routed tensor becomes."""
    if route.form is None:
        return tuple(Part(part.spec.name, part.spec.dtype, part.spec.shape) for part in route.output.source.stored)
    return route.form.parts(route.spec)
