"""The plan: every tensor's way from source to artifact, every output byte's place, and all problems at once.

Made from headers alone; no weight is read (the adapter's file is hashed). A plan with problems cannot be built.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_export import __version__, catalog
from qlora_export.contracts import Exporter, Format, Onto, Part, TensorSpec, TrainingQuantization
from qlora_export.errors import PlanRefused, Problem, UsageError
from qlora_export.merge.carried import (
    CarriedFile,
    beside_sha256,
    carried_files,
    differing_tokenizer_files,
    edited_config,
)
from qlora_export.merge.homes import Adaptation, match_adapter
from qlora_export.merge.trained_base import quantised_modules
from qlora_export.preflight import (
    artifact_problems,
    base_problems,
    disk_problems,
    opened,
    place_problems,
    training_problems,
)
from qlora_export.recipe import ArtifactRecipe, Recipe
from qlora_export.sources.adapter import Adapter, open_adapter, variant_problems
from qlora_export.sources.checkpoint import Checkpoint, open_checkpoint
from qlora_export.tensors.dtypes import FLOATS, TORCH_NAMES
from qlora_export.tensors.layout import INDEX_NAME, Layout, lay_out

# Weights that a worker moves at once: two float32 copies of them stay within a core's second-level cache.
BLOCK_WEIGHTS = 1 << 17
INTERPRETER_BYTES = 220_000_000


@dataclass(frozen=True)
class Route:
    """The way of one tensor into one artifact: the format that encodes it, or None when its bytes are copied."""

    spec: TensorSpec
    form: Format | None


@dataclass(frozen=True)
class ArtifactPlan:
    """One artifact to the byte."""

    recipe: ArtifactRecipe
    form: Format
    onto: Onto
    routes: Mapping[str, Route]
    layout: Layout
    carried: tuple[CarriedFile, ...]
    digest: str

    @property
    def name(self) -> str:
        """Name of the artifact and of its folder."""
        return self.recipe.name

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all files but the manifest, sorted."""
        return tuple(sorted([shard.file for shard in self.layout.shards] + [file.name for file in self.carried]))

    @property
    def bytes(self) -> int:
        """Size of the folder without its manifest."""
        return self.layout.total_bytes + sum(file.bytes for file in self.carried)


@dataclass(frozen=True)
class ExportPlan:
    """One artifact that an exporter makes from a dense one or from the adapter; its bytes are an estimate."""

    recipe: ArtifactRecipe
    exporter: Exporter
    source: ArtifactPlan | None
    bytes: int
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
    """What a build will do; `assumptions` are choices that nobody stated."""

    recipe: Recipe
    checkpoint: Checkpoint
    adapter: Adapter | None
    training: TrainingQuantization
    adaptations: Mapping[str, Adaptation]
    quantised: AbstractSet[str]
    artifacts: tuple[ArtifactPlan, ...]
    exports: tuple[ExportPlan, ...]
    assumptions: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Size of all artifacts together."""
        return sum(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every artifact by name, those of exports estimated."""
        return {item.name: item.bytes for item in self.artifacts} | {item.name: item.bytes for item in self.exports}

    def peak_memory_bytes(self, workers: int) -> int:
        """Estimate of resident memory: the interpreter, row blocks in work, and the state of the largest tensors."""
        largest = max(tensor.spec.size for tensor in self.checkpoint.tensors.values())
        widest = max(tensor.spec.columns for tensor in self.checkpoint.tensors.values())
        factors = [a.a.spec.size + a.b.spec.size for a in self.adaptations.values()]
        block = max(BLOCK_WEIGHTS, widest * self.training.block_size) * 4 * (4 + len(self.artifacts))
        state = largest // self.training.block_size * 4 * (2 + len(self.artifacts))
        return INTERPRETER_BYTES + workers * block + 2 * (state + 4 * max(factors, default=0))


def make_plan(recipe: Recipe, out: Path) -> Plan:
    """Plan a recipe; raises PlanRefused with every problem that the headers show."""
    sources = [recipe.path(text) for text in (recipe.base, recipe.adapter) if text]
    checkpoint = opened(open_checkpoint, sources[0])
    adapter = opened(open_adapter, sources[1]) if recipe.adapter else None
    problems = [found for found in (checkpoint, adapter) if isinstance(found, Problem)]
    problems += place_problems(out, sources)
    if problems or isinstance(checkpoint, Problem) or isinstance(adapter, Problem):
        raise PlanRefused(problems)
    problems = base_problems(checkpoint)
    training = TrainingQuantization(storage_dtype=checkpoint.dtype, compute_dtype=checkpoint.dtype)
    adaptations: dict[str, Adaptation] = {}
    if adapter is not None:
        training = adapter.training
        adaptations, misfits = match_adapter(adapter, checkpoint)
        problems += [*variant_problems(adapter), *training_problems(adapter, checkpoint), *misfits]
    quantised = quantised_modules(checkpoint, training)
    problems += artifact_problems(recipe, training, quantised)
    if problems:
        raise PlanRefused(problems)
    inputs = Inputs(recipe, checkpoint, adapter, training, quantised)
    artifacts = tuple(_plan_artifact(inputs, item) for item in recipe.artifacts if item.format in catalog.FORMATS)
    exports = tuple(
        _plan_export(inputs, item, artifacts) for item in recipe.artifacts if item.format in catalog.EXPORTERS
    )
    assumptions = _assumptions(checkpoint, adapter)
    plan = Plan(recipe, checkpoint, adapter, training, adaptations, quantised, artifacts, exports, assumptions)
    if problems := disk_problems(out, plan.sizes):
        raise PlanRefused(problems)
    return plan


@dataclass(frozen=True)
class Inputs:
    """What an artifact is planned from."""

    recipe: Recipe
    checkpoint: Checkpoint
    adapter: Adapter | None
    training: TrainingQuantization
    quantised: AbstractSet[str]

    def onto(self, item: ArtifactRecipe) -> Onto:
        """The merge base of one artifact; without an adapter there is nothing to merge, and the weights stay."""
        return self.recipe.onto(item) if self.adapter else "original"


def _assumptions(checkpoint: Checkpoint, adapter: Adapter | None) -> tuple[str, ...]:
    found = []
    training = adapter.training if adapter else None
    if training is None:
        found.append("no adapter: the base is released as it is, and is its own reference")
    elif not training.recorded:
        found.append(
            f"no sidecar: assumed {training.quant_type} in blocks of {training.block_size} with double quantisation, "
            f"loaded in {TORCH_NAMES[training.storage_dtype]}, computed in {TORCH_NAMES[training.compute_dtype]}, "
            "every linear layer quantised but the output head"
        )
    elif training.base_sha256 is None:
        found.append("the sidecar does not say which base it was: only the hashes of its weights are checked")
    if checkpoint.tied:
        found.append("the output head is tied to the embedding, and stays so")
    if adapter is not None and (names := differing_tokenizer_files(checkpoint, adapter)):
        found.append(f"taken from the adapter, where they differ from the base's: {', '.join(names)}")
    return tuple(found)


def _plan_artifact(inputs: Inputs, item: ArtifactRecipe) -> ArtifactPlan:
    checkpoint, quantised = inputs.checkpoint, inputs.quantised
    form = catalog.load_format(item.format, inputs.training)
    dense = form
    if form.quantises:
        dense = catalog.load_format(catalog.DENSE_FORMATS[form.dense_dtype], inputs.training)
    dropped = {name for pattern in item.keep for name in fnmatch.filter(quantised, pattern)}
    encoded = quantised - dropped if form.quantises else frozenset()
    routes = {}
    for name, tensor in checkpoint.tensors.items():
        chosen = form if tensor.spec.module in encoded and name.endswith(".weight") else dense
        routes[name] = Route(tensor.spec, chosen if tensor.spec.dtype in FLOATS else None)
    layout = lay_out((route_parts(route) for route in routes.values()), inputs.recipe.shard_bytes)
    matrices = {spec.module for spec in (route.spec for route in routes.values()) if len(spec.shape) == 2}
    kept = tuple(sorted({"lm_head"} | (matrices - encoded)))
    carried = carried_files(checkpoint, inputs.adapter, form, edited_config(checkpoint.config, form, kept))
    if (index := layout.index()) is not None:
        carried += (CarriedFile(INDEX_NAME, content=index),)
    onto: Onto = "as-trained" if form.keeps_adapter else inputs.onto(item)
    plan = ArtifactPlan(item, form, onto, routes, layout, carried, "")
    return replace(plan, digest=_digest(plan, inputs))


def _plan_export(inputs: Inputs, item: ArtifactRecipe, artifacts: tuple[ArtifactPlan, ...]) -> ExportPlan:
    """An export from the first dense artifact with the same merge base, or from the adapter."""
    exporter = catalog.load_exporter(item.format, item.options)
    source = _dense_source(inputs, item, artifacts) if exporter.takes == "dense" else None
    if exporter.takes == "adapter" and inputs.adapter is None:
        raise UsageError(f"artifact {item.name}: the recipe has no adapter", "name one, or drop the artifact")
    weights = sum(tensor.spec.size for tensor in inputs.checkpoint.tensors.values())
    size = int(weights * exporter.bytes_per_weight)
    if source is None and inputs.adapter is not None:
        size = inputs.adapter.weights.stat().st_size
    facts = {
        "version": __version__,
        "source": source.digest if source else inputs.adapter and inputs.adapter.sha256,
        "base": inputs.checkpoint.headers_sha256,
        "base_id": inputs.recipe.base_id,
        "training": repr(inputs.training),
        "beside": beside_sha256(inputs.adapter.folder) if inputs.adapter and not source else {},
        "exporter": exporter.name,
        "facts": dict(exporter.facts()),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return ExportPlan(item, exporter, source, size, digest)


def _dense_source(inputs: Inputs, item: ArtifactRecipe, artifacts: tuple[ArtifactPlan, ...]) -> ArtifactPlan:
    onto = inputs.onto(item)
    source = next((found for found in artifacts if not found.form.quantises and found.onto == onto), None)
    if source is None:
        raise UsageError(
            f"artifact {item.name}: {item.format} is exported from a dense artifact merged onto {onto}, there is none",
            "add `- format: bf16` to the artifacts",
        )
    return source


def route_parts(route: Route) -> tuple[Part, ...]:
    """The parts that a routed tensor becomes."""
    if route.form is None:
        return (Part(route.spec.name, route.spec.dtype, route.spec.shape),)
    return route.form.parts(route.spec)


def _digest(plan: ArtifactPlan, inputs: Inputs) -> str:
    """sha256 of everything that decides this artifact's bytes, but for the weights themselves."""
    facts = {
        "version": __version__,
        "base": inputs.checkpoint.headers_sha256,
        "base_id": inputs.recipe.base_id,
        "base_files": {path.name: path.stat().st_size for path in inputs.checkpoint.files},
        "adapter": inputs.adapter.sha256 if inputs.adapter else None,
        "training": repr(inputs.training),
        "format": plan.form.name,
        "onto": plan.onto,
        "headers": [hashlib.sha256(shard.header).hexdigest() for shard in plan.layout.shards],
        "carried": {file.name: file.sha256() for file in plan.carried},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
