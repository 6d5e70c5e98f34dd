"""The plan: every tensor's way from source to artifact, every output byte's place, and all problems at once.

Made from headers, the adapter, and a sample of the base's rows, which tells what of a delta survives a rounding. A plan
with problems cannot be built.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qlora_export._version import __version__
from qlora_export.errors import PlanRefused, Problem
from qlora_export.formats.base import Format, MixedFormat
from qlora_export.merge.companion_files import CompanionFile, companion_files, edited_config
from qlora_export.merge.matching import match_adapter
from qlora_export.merge.merged_model import unmerged_model
from qlora_export.merge.module_names import names_of
from qlora_export.merge.trained_quantization import training_facts
from qlora_export.planning.artifact_checks import (
    artifact_problems,
    kept_adapter_problems,
    layer_problems,
)
from qlora_export.planning.assumptions import assumptions_of, combination_notes
from qlora_export.planning.disk_checks import disk_problems
from qlora_export.planning.export_checks import export_problems
from qlora_export.planning.exports import plan_export
from qlora_export.planning.inputs import Inputs
from qlora_export.planning.open_sources import Sources, open_sources
from qlora_export.planning.plan import ArtifactPlan, Plan, Route, route_parts
from qlora_export.planning.resolve import ResolvedFormat, resolve_artifacts
from qlora_export.planning.rounding import RoundingChoice, choose_roundings
from qlora_export.planning.rounding_checks import CALIBRATED, rounding_problems
from qlora_export.planning.source_checks import (
    base_problems,
    merge_problems,
    opened,
    read_values,
    shape_problems,
    training_problems,
)
from qlora_export.recipe.config import Recipe
from qlora_export.tensors.dtypes import FLOATS
from qlora_export.tensors.layout import INDEX_NAME, lay_out
from qlora_export.types import Onto, TensorSpec

INTERPRETER_BYTES = 220_000_000
TRANSFORMERS_BYTES = 300_000_000
# Each says everything that it finds wrong.
CHECKS = (artifact_problems, kept_adapter_problems, layer_problems, rounding_problems, export_problems)


def make_plan(recipe: Recipe, out: Path, notes: tuple[str, ...] = ()) -> Plan:
    """Plan a recipe; `notes` say what was settled before. Raises PlanRefused with every problem there is."""
    sources = open_sources(recipe, out)
    inputs, found, problems = _inputs(recipe, sources)
    if problems := [*problems, *(problem for check in CHECKS for problem in check(inputs))]:
        raise PlanRefused(list(dict.fromkeys(problems)))
    roundings = choose_roundings(inputs)
    artifacts = tuple(_plan_artifact(inputs, item, roundings[item.recipe.name]) for item in inputs.formats)
    exports = tuple(plan_export(inputs, item, artifacts) for item in inputs.exports)
    assumptions = (*notes, *found, *combination_notes(sources.combined, recipe.merge), *assumptions_of(inputs))
    assumptions += tuple(note for name, choice in roundings.items() if (note := choice.note(name)) is not None)
    plan = Plan(
        recipe=recipe,
        opened=sources,
        model=inputs.model,
        training=inputs.facts.stored,
        live_training=inputs.facts.live,
        artifacts=artifacts,
        exports=exports,
        assumptions=assumptions,
        library_bytes=INTERPRETER_BYTES + (TRANSFORMERS_BYTES if inputs.names.asked_transformers else 0),
    )
    working = max((item.working_bytes for item in exports if not (out / item.name).exists()), default=0)
    if problems := disk_problems(out, plan.sizes, working):
        raise PlanRefused(problems)
    return plan


def _inputs(recipe: Recipe, sources: Sources) -> tuple[Inputs, tuple[str, ...], list[Problem]]:
    """What the sources come to together, with what is to be said of them and what is wrong with them.

    Raises PlanRefused where that is too much to look any further.
    """
    checkpoint, adapter, problems = sources.checkpoint, sources.adapter, list(sources.problems)
    if checkpoint is None or (adapter is None and recipe.adapters):
        raise PlanRefused(problems)
    match = match_adapter(adapter, checkpoint) if adapter else None
    names = match.names if match else names_of(checkpoint, False, ())
    model = match.model if match else unmerged_model(names)
    notes: tuple[str, ...] = ()
    if adapter is None or match is None:
        problems += [*base_problems(checkpoint), *shape_problems(checkpoint, model)]
    else:
        values = read_values(adapter)
        problems += merge_problems(adapter, checkpoint, match, values, recipe.merge)
        if zeros := values.zeros:
            notes = (f"{len(zeros)} factors are all zero, the first is {zeros[0]}: kept as it was stated",)
    facts = opened(partial(training_facts, adapter, recipe.stated_training), names)
    if isinstance(facts, Problem):
        raise PlanRefused([*problems, facts])
    if adapter is not None:
        problems += training_problems(adapter, checkpoint, facts)
    resolved = resolve_artifacts(recipe, facts.stored.quantization)
    inputs = Inputs(
        recipe=recipe,
        checkpoint=checkpoint,
        adapter=adapter,
        model=model,
        unmerged=unmerged_model(names),
        facts=facts,
        names=names,
        artifacts=resolved,
    )
    return inputs, notes, problems


def _plan_artifact(inputs: Inputs, resolved: ResolvedFormat, rounding: RoundingChoice) -> ArtifactPlan:
    checkpoint, form, item = inputs.checkpoint, rounding.form, resolved.recipe
    model = inputs.unmerged if form.consumes == "base" else inputs.model
    encoded = inputs.encoded(resolved) if form.quantises else frozenset()
    routes = {}
    for name, output in model.outputs.items():
        encodes = output.spec.module in encoded and name.endswith(".weight")
        as_stored = rounding.keeps(output, encodes) or output.carried or output.spec.dtype not in FLOATS
        chosen = _form_of(form, output.layer_spec) if encodes else resolved.dense
        base = rounding.base_of(output, encodes, inputs.onto(item))
        routes[name] = Route(output, None if as_stored else chosen, base)
    layout = lay_out((route_parts(route) for route in routes.values()), inputs.recipe.shard_bytes)
    matrices = {spec.module for spec in (output.spec for output in model.outputs.values()) if len(spec.shape) == 2}
    kept = tuple(sorted({"lm_head"} | inputs.names.both_names(matrices - encoded))) if form.quantises else ()
    config = edited_config(checkpoint.config, form, kept, model.settings)
    carried = companion_files(checkpoint, inputs.adapter, form, config)
    if (index := layout.index()) is not None:
        carried += (CompanionFile(INDEX_NAME, content=index),)
    onto: Onto = "as-trained" if form.keeps_adapter else inputs.onto(item)
    plan = ArtifactPlan(item, rounding, onto, routes, layout, carried, "")
    return replace(plan, digest=_digest(plan, inputs))


def _form_of(form: Format, spec: TensorSpec) -> Format:
    return form.of(spec) if isinstance(form, MixedFormat) else form


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
        "rounding": [plan.rounding.chosen, plan.rounding.seed],
        "headers": [hashlib.sha256(shard.header).hexdigest() for shard in plan.layout.shards],
        "carried": {file.name: file.sha256() for file in plan.carried},
        "calibration": _calibration(inputs.recipe) if plan.rounding.chosen in CALIBRATED else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _calibration(recipe: Recipe) -> dict[str, Any] | None:
    """The recipe's section on calibration, and the digests of texts that are files."""
    if recipe.calibration is None:
        return None
    paths = {part.text: recipe.path(part.text) for part in recipe.calibration.parts}
    digests = {text: CompanionFile(text, source=path).sha256() for text, path in paths.items() if path.is_file()}
    return {**recipe.calibration.model_dump(), "sha256": digests}
