"""The plan: every tensor's way from source to artifact, every output byte's place, and all problems at once.

Made from headers alone; no weight is read (the adapter's file is hashed). A plan with problems cannot be built.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_export import __version__, catalog
from qlora_export.contracts import Format, Onto, Part, TensorSpec, TrainingQuantization
from qlora_export.errors import ExitCode, ExportError, PlanRefused, Problem
from qlora_export.merge.carried import CarriedFile, carried_files, differing_tokenizer_files, edited_config
from qlora_export.merge.homes import Adaptation, match_adapter
from qlora_export.merge.trained_base import quantised_modules
from qlora_export.recipe import ArtifactRecipe, Recipe
from qlora_export.sources.adapter import Adapter, open_adapter, variant_problems
from qlora_export.sources.checkpoint import Checkpoint, open_checkpoint
from qlora_export.tensors.dtypes import FLOATS, TORCH_NAMES
from qlora_export.tensors.layout import INDEX_NAME, Layout, lay_out

# Weights that a worker moves at once: two float32 copies of them stay within a core's second-level cache.
BLOCK_WEIGHTS = 1 << 17
INTERPRETER_BYTES = 220_000_000
SECTOR_BYTES = 512


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
class Plan:
    """What a build will do; `assumptions` are choices that nobody stated."""

    recipe: Recipe
    checkpoint: Checkpoint
    adapter: Adapter
    adaptations: Mapping[str, Adaptation]
    quantised: AbstractSet[str]
    artifacts: tuple[ArtifactPlan, ...]
    assumptions: tuple[str, ...]

    @property
    def training(self) -> TrainingQuantization:
        """How the base was quantised in training."""
        return self.adapter.training

    @property
    def bytes(self) -> int:
        """Size of all artifacts together."""
        return sum(artifact.bytes for artifact in self.artifacts)

    def peak_memory_bytes(self, workers: int) -> int:
        """Estimate of resident memory: the interpreter, row blocks in work, and the state of the largest tensors."""
        largest = max(tensor.spec.size for tensor in self.checkpoint.tensors.values())
        widest = max(tensor.spec.columns for tensor in self.checkpoint.tensors.values())
        factors = [a.a.spec.size + a.b.spec.size for a in self.adaptations.values()]
        block = max(BLOCK_WEIGHTS, widest * self.training.block_size) * 4 * (4 + len(self.artifacts))
        state = largest // self.training.block_size * 4 * (2 + len(self.artifacts))
        return INTERPRETER_BYTES + workers * block + 2 * (state + 4 * max(factors, default=0))

    def summary(self, workers: int) -> dict[str, Any]:
        """The plan as JSON."""
        return {
            "schema": 1,
            "recipe_digest": self.recipe.digest,
            "base": {"path": str(self.checkpoint.folder), "headers_sha256": self.checkpoint.headers_sha256},
            "adapter": {"path": str(self.adapter.folder), "sha256": self.adapter.digest()},
            "adapted_tensors": len(self.adaptations),
            "quantised_in_training": len(self.quantised),
            "assumptions": list(self.assumptions),
            "bytes": self.bytes,
            "peak_memory_bytes": self.peak_memory_bytes(workers),
            "artifacts": [
                {
                    "name": artifact.name,
                    "format": artifact.form.name,
                    "onto": artifact.onto,
                    "digest": artifact.digest,
                    "bytes": artifact.bytes,
                    "tensors": len(artifact.routes),
                    "files": {
                        **{shard.file: shard.bytes for shard in artifact.layout.shards},
                        **{file.name: file.bytes for file in artifact.carried},
                    },
                }
                for artifact in self.artifacts
            ],
        }


def make_plan(recipe: Recipe, out: Path) -> Plan:
    """Plan a recipe; raises PlanRefused with every problem that the headers show."""
    opened = [_opened(open_checkpoint, recipe.path(recipe.base)), _opened(open_adapter, recipe.path(recipe.adapter))]
    problems = [found for found in opened if isinstance(found, Problem)]
    problems += _place_problems(out, [recipe.path(recipe.base), recipe.path(recipe.adapter)])
    if problems:
        raise PlanRefused(problems)
    checkpoint, adapter = opened
    adaptations, misfits = match_adapter(adapter, checkpoint)
    problems = [*_base_problems(checkpoint), *variant_problems(adapter), *_training_problems(adapter, checkpoint)]
    problems += misfits
    quantised = quantised_modules(checkpoint, adapter.training)
    problems += _artifact_problems(recipe, adapter.training, quantised)
    if problems:
        raise PlanRefused(problems)
    artifacts = tuple(_plan_artifact(recipe, item, checkpoint, adapter, quantised) for item in recipe.artifacts)
    plan = Plan(recipe, checkpoint, adapter, adaptations, quantised, artifacts, _assumptions(checkpoint, adapter))
    if problem := _disk_problem(plan, out):
        raise PlanRefused([problem])
    return plan


def _opened(opener: Any, folder: Path) -> Any:
    try:
        return opener(folder)
    except ExportError as error:
        return Problem.of(error)


def _base_problems(checkpoint: Checkpoint) -> list[Problem]:
    sections = {"config.json": checkpoint.config, **checkpoint.config}
    stored = {
        name: section["quantization_config"]
        for name, section in sections.items()
        if isinstance(section, dict) and section.get("quantization_config")
    }
    problems = [
        Problem(
            ExitCode.REFUSED,
            f"{checkpoint.folder}: the base is stored in "
            f"{how.get('quant_method', 'an unnamed method') if isinstance(how, dict) else how} ({name}), "
            "which cannot be merged onto yet",
            "give the 16-bit base",
        )
        for name, how in stored.items()
    ]
    odd = [tensor for tensor in checkpoint.tensors.values() if tensor.spec.dtype[0] == "F"]
    return problems + [
        Problem(
            ExitCode.REFUSED,
            f"{tensor.path}: tensor {tensor.spec.name} has dtype {tensor.spec.dtype}",
            "only 16 and 32-bit floats can be merged yet",
        )
        for tensor in odd
        if tensor.spec.dtype not in FLOATS
    ]


def _training_problems(adapter: Adapter, checkpoint: Checkpoint) -> list[Problem]:
    training = adapter.training
    problems = []
    if training.quant_type != "nf4":
        problems.append(
            Problem(
                ExitCode.REFUSED,
                f"{adapter.folder}: the base was trained on as {training.quant_type}, which cannot be reproduced yet",
                "this version reproduces nf4",
            )
        )
    if training.base_sha256 not in (None, checkpoint.headers_sha256):
        problems.append(
            Problem(
                ExitCode.BAD_INPUT,
                f"{checkpoint.folder}: names, shapes and dtypes have sha256 {checkpoint.headers_sha256[:12]}, "
                f"the adapter was trained on {str(training.base_sha256)[:12]}",
                "give the base that the adapter was trained on",
            )
        )
    missing = [name for name in training.modules if f"{name}.weight" not in checkpoint.tensors]
    if missing:
        problems.append(
            Problem(
                ExitCode.BAD_INPUT,
                f"{checkpoint.folder}: {len(missing)} modules quantised in training are not in the base, "
                f"the first is {missing[0]}",
                "give the base that the adapter was trained on",
            )
        )
    return problems


def _place_problems(out: Path, sources: list[Path]) -> list[Problem]:
    """Sources are never written to, so the run folder may not be or lie in one."""
    place = out.absolute().resolve()
    return [
        Problem(ExitCode.USAGE, f"{out}: lies in the source {source}", "choose another --out")
        for source in sources
        if source.resolve() in (place, *place.parents)
    ]


def _artifact_problems(recipe: Recipe, training: TrainingQuantization, quantised: AbstractSet[str]) -> list[Problem]:
    """What an artifact is told that its format cannot do."""
    problems = []
    for artifact in recipe.artifacts:
        form = catalog.load_format(artifact.format, training)
        unmatched = [pattern for pattern in artifact.keep if not fnmatch.filter(quantised, pattern)]
        problems += [(artifact, f"keep {pattern!r} matches no quantised module") for pattern in unmatched]
        if artifact.keep and not form.quantises:
            problems.append((artifact, f"{artifact.format} quantises nothing, so there is nothing to keep"))
        if form.keeps_adapter and (artifact.keep or artifact.onto == "original"):
            problems.append((artifact, f"{artifact.format} ships the base of training as it was"))
    return [
        Problem(ExitCode.USAGE, f"artifact {artifact.name}: {message}", "see `keep` and `onto` of this artifact")
        for artifact, message in problems
    ]


def _assumptions(checkpoint: Checkpoint, adapter: Adapter) -> tuple[str, ...]:
    training = adapter.training
    found = []
    if not training.recorded:
        found.append(
            f"no sidecar: assumed {training.quant_type} in blocks of {training.block_size} with double quantisation, "
            f"loaded in {TORCH_NAMES[training.storage_dtype]}, computed in {TORCH_NAMES[training.compute_dtype]}, "
            "every linear layer quantised but the output head"
        )
    elif training.base_sha256 is None:
        found.append("the sidecar does not say which base it was: only the hashes of its weights are checked")
    if checkpoint.tied:
        found.append("the output head is tied to the embedding, and stays so")
    if names := differing_tokenizer_files(checkpoint, adapter):
        found.append(f"taken from the adapter, where they differ from the base's: {', '.join(names)}")
    return tuple(found)


def _plan_artifact(
    recipe: Recipe, item: ArtifactRecipe, checkpoint: Checkpoint, adapter: Adapter, quantised: AbstractSet[str]
) -> ArtifactPlan:
    form = catalog.load_format(item.format, adapter.training)
    dense = form
    if form.quantises:
        dense = catalog.load_format(catalog.DENSE_FORMATS[form.dense_dtype], adapter.training)
    dropped = {name for pattern in item.keep for name in fnmatch.filter(quantised, pattern)}
    encoded = quantised - dropped if form.quantises else frozenset()
    routes = {}
    for name, tensor in checkpoint.tensors.items():
        chosen = form if tensor.spec.module in encoded and name.endswith(".weight") else dense
        routes[name] = Route(tensor.spec, chosen if tensor.spec.dtype in FLOATS else None)
    layout = lay_out((route_parts(route) for route in routes.values()), recipe.shard_bytes)
    matrices = {spec.module for spec in (route.spec for route in routes.values()) if len(spec.shape) == 2}
    kept = tuple(sorted({"lm_head"} | (matrices - encoded)))
    carried = carried_files(checkpoint, adapter, form, edited_config(checkpoint.config, form, kept))
    if (index := layout.index()) is not None:
        carried += (CarriedFile(INDEX_NAME, content=index),)
    onto: Onto = "as-trained" if form.keeps_adapter else recipe.onto(item)
    plan = ArtifactPlan(item, form, onto, routes, layout, carried, "")
    return replace(plan, digest=_digest(plan, checkpoint, adapter))


def route_parts(route: Route) -> tuple[Part, ...]:
    """The parts that a routed tensor becomes."""
    if route.form is None:
        return (Part(route.spec.name, route.spec.dtype, route.spec.shape),)
    return route.form.parts(route.spec)


def _digest(plan: ArtifactPlan, checkpoint: Checkpoint, adapter: Adapter) -> str:
    """sha256 of everything that decides this artifact's bytes, but for the weights themselves."""
    facts = {
        "version": __version__,
        "base": checkpoint.headers_sha256,
        "base_files": {path.name: path.stat().st_size for path in checkpoint.files},
        "adapter": adapter.digest(),
        "training": repr(adapter.training),
        "format": plan.form.name,
        "onto": plan.onto,
        "headers": [hashlib.sha256(shard.header).hexdigest() for shard in plan.layout.shards],
        "carried": {file.name: file.sha256() for file in plan.carried},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _disk_problem(plan: Plan, out: Path) -> Problem | None:
    """A problem when the artifacts that are not finished yet do not fit the disk."""
    needed = 0
    for artifact in plan.artifacts:
        if not (out / artifact.name).exists():
            partial = (out / f"{artifact.name}.partial").glob("*")
            needed += max(0, artifact.bytes - sum(path.lstat().st_blocks * SECTOR_BYTES for path in partial))
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed <= free:
        return None
    message = f"{out}: the artifacts need {needed} bytes, the disk has {free} free"
    return Problem(ExitCode.ENVIRONMENT, message, "free some disk space or choose another --out")
