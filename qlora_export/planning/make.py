"""The plan: every tensor's way from source to artifact, every output byte's place, and all problems at once.

Made from headers, the adapter, and a sample of the base's rows, which tells what of a delta survives a rounding. A plan
with problems cannot be built.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qlora_export import catalog
from qlora_export._version import __version__
from qlora_export.errors import PlanRefused, Problem, UsageError
from qlora_export.exporters.base import Exporter, RoundedExporter
from qlora_export.exporters.registry import load_exporter
from qlora_export.formats.base import Format, MixedFormat
from qlora_export.formats.registry import load_format
from qlora_export.merge.companion_files import CarriedFile, beside_sha256, carried_files, edited_config, merged_config
from qlora_export.merge.matching import match_adapter
from qlora_export.merge.merged_model import unmerged_model
from qlora_export.merge.module_names import names_of
from qlora_export.merge.trained_quantization import training_facts
from qlora_export.planning.artifact_checks import (
    artifact_problems,
    encoded_modules,
    kept_adapter_problems,
    layer_problems,
)
from qlora_export.planning.assumptions import assumptions_of, combination_notes
from qlora_export.planning.disk_checks import disk_problems
from qlora_export.planning.export_checks import export_problems
from qlora_export.planning.inputs import Inputs
from qlora_export.planning.open_sources import open_sources
from qlora_export.planning.plan import ArtifactPlan, ExportPlan, Plan, Route, route_parts
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
from qlora_export.recipe.config import ArtifactRecipe, Recipe
from qlora_export.tensors.dtypes import FLOATS
from qlora_export.tensors.layout import INDEX_NAME, lay_out
from qlora_export.types import Onto, TensorSpec

INTERPRETER_BYTES = 220_000_000
TRANSFORMERS_BYTES = 300_000_000


def make_plan(recipe: Recipe, out: Path, notes: tuple[str, ...] = ()) -> Plan:
    """Plan a recipe; `notes` say what was settled before. Raises PlanRefused with every problem there is."""
    sources = open_sources(recipe, out)
    checkpoint, adapter, problems = sources.checkpoint, sources.adapter, list(sources.problems)
    if checkpoint is None or (adapter is None and recipe.adapters):
        raise PlanRefused(problems)
    match = match_adapter(adapter, checkpoint) if adapter else None
    names = match.names if match else names_of(checkpoint, False, ())
    model = match.model if match else unmerged_model(names)
    if adapter is None or match is None:
        problems += [*base_problems(checkpoint), *shape_problems(checkpoint, model)]
    else:
        values = read_values(adapter)
        problems += merge_problems(adapter, checkpoint, match, values, recipe.merge)
        if values.zeros:
            notes += (
                f"{len(values.zeros)} factors are all zero, the first is {values.zeros[0]}: kept as it was stated",
            )
    facts = opened(partial(training_facts, adapter, recipe.stated_training), names)
    if isinstance(facts, Problem):
        raise PlanRefused([*problems, facts])
    if adapter is not None:
        problems += training_problems(adapter, checkpoint, facts)
    problems += [*artifact_problems(recipe, facts), *kept_adapter_problems(recipe, facts, model)]
    problems += [*layer_problems(recipe, facts, model), *rounding_problems(recipe, facts, model)]
    problems += export_problems(recipe, checkpoint, model, facts)
    if problems:
        raise PlanRefused(list(dict.fromkeys(problems)))
    inputs = Inputs(recipe, checkpoint, adapter, model, unmerged_model(names), facts, names)
    roundings = choose_roundings(inputs)
    artifacts = tuple(
        _plan_artifact(inputs, item, roundings[item.name]) for item in recipe.artifacts if item.name in roundings
    )
    exports = tuple(
        _plan_export(inputs, item, artifacts) for item in recipe.artifacts if item.format in catalog.EXPORTERS
    )
    libraries = INTERPRETER_BYTES + (TRANSFORMERS_BYTES if names.asked_transformers else 0)
    assumptions = (*notes, *combination_notes(sources.combined, recipe.merge), *assumptions_of(inputs))
    assumptions += tuple(note for name, choice in roundings.items() if (note := choice.note(name)) is not None)
    plan = Plan(recipe, sources, model, facts.stored, facts.live, artifacts, exports, assumptions, libraries)
    working = max((item.working_bytes for item in exports if not (out / item.name).exists()), default=0)
    if problems := disk_problems(out, plan.sizes, working):
        raise PlanRefused(problems)
    return plan


def _plan_artifact(inputs: Inputs, item: ArtifactRecipe, rounding: RoundingChoice) -> ArtifactPlan:
    checkpoint, form = inputs.checkpoint, rounding.form
    dense = form
    if form.quantises:
        dense = load_format(catalog.DENSE_FORMATS[form.dense_dtype], inputs.training)
    model = inputs.unmerged if form.consumes == "base" else inputs.model
    encoded = encoded_modules(item, inputs.facts) if form.quantises else frozenset()
    routes = {}
    for name, output in model.outputs.items():
        encodes = output.spec.module in encoded and name.endswith(".weight")
        as_stored = rounding.keeps(output, encodes) or output.carried or output.spec.dtype not in FLOATS
        chosen = _form_of(form, output.layer_spec) if encodes else dense
        base = rounding.base_of(output, encodes, inputs.onto(item))
        routes[name] = Route(output, None if as_stored else chosen, base)
    layout = lay_out((route_parts(route) for route in routes.values()), inputs.recipe.shard_bytes)
    matrices = {spec.module for spec in (output.spec for output in model.outputs.values()) if len(spec.shape) == 2}
    kept = tuple(sorted({"lm_head"} | inputs.names.both_names(matrices - encoded))) if form.quantises else ()
    config = edited_config(checkpoint.config, form, kept, model.settings)
    carried = carried_files(checkpoint, inputs.adapter, form, config)
    if (index := layout.index()) is not None:
        carried += (CarriedFile(INDEX_NAME, content=index),)
    onto: Onto = "as-trained" if form.keeps_adapter else inputs.onto(item)
    plan = ArtifactPlan(item, rounding, onto, routes, layout, carried, "")
    return replace(plan, digest=_digest(plan, inputs))


def _form_of(form: Format, spec: TensorSpec) -> Format:
    return form.of(spec) if isinstance(form, MixedFormat) else form


def _plan_export(inputs: Inputs, item: ArtifactRecipe, artifacts: tuple[ArtifactPlan, ...]) -> ExportPlan:
    """An export from the first artifact that its exporter can start from, or from the adapter."""
    exporter = load_exporter(item.format, item.options, item.rounding)
    source = _export_source(inputs, item, exporter, artifacts)
    if exporter.takes == "adapter" and inputs.adapter is None:
        raise UsageError(f"artifact {item.name}: the recipe has no adapter", "name one, or drop the artifact")
    weights = sum(output.spec.size for output in inputs.model.outputs.values())
    size = int(weights * exporter.bytes_per_weight)
    if source is None and inputs.adapter is not None:
        size = sum(path.stat().st_size for path in inputs.adapter.files)
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
    config = merged_config(inputs.checkpoint.config, "bfloat16", inputs.model.settings)
    working = int(weights * exporter.working_bytes_per_weight(config))
    return ExportPlan(item, exporter, source, size, working, digest)


def _export_source(
    inputs: Inputs, item: ArtifactRecipe, exporter: Exporter, artifacts: tuple[ArtifactPlan, ...]
) -> ArtifactPlan | None:
    """What an export is made from; None is the adapter. Raises UsageError where the recipe does not make it."""
    if exporter.takes == "adapter":
        return None
    if exporter.takes == "dense":
        return _dense_source(inputs, item, artifacts)
    if isinstance(exporter, RoundedExporter):
        return _rounded_source(inputs, item, exporter, artifacts)
    found = [artifact for artifact in artifacts if artifact.recipe.format == exporter.takes]
    if not found:
        raise _no_codes(item, exporter.takes, f"format: {exporter.takes}")
    return found[0]


def _rounded_source(
    inputs: Inputs, item: ArtifactRecipe, exporter: RoundedExporter, artifacts: tuple[ArtifactPlan, ...]
) -> ArtifactPlan:
    """The one artifact of this rounding and merge base whose integers are meant."""
    alike = [
        artifact
        for artifact in artifacts
        if artifact.onto == inputs.onto(item) and artifact.rounding.chosen == exporter.rounding
    ]
    found = [
        artifact
        for artifact in alike
        if artifact.recipe.format == exporter.takes and exporter.accepts(artifact.recipe.options)
    ]
    if len(found) > 1:
        names = ", ".join(artifact.name for artifact in found)
        raise UsageError(
            f"artifact {item.name}: the integers of {names} could be meant",
            "state `block_size` or `symmetric` in its options, or make one of them alone",
        )
    if not found:
        formats = dict.fromkeys(artifact.recipe.format for artifact in alike)
        others = [f"`options: {{integers: {name}}}`" for name in formats if name in exporter.sources]
        raise _no_codes(item, exporter.takes, f"format: {exporter.takes}, rounding: {exporter.rounding}", others)
    return found[0]


def _no_codes(item: ArtifactRecipe, takes: str, wanted: str, others: Iterable[str] = ()) -> UsageError:
    return UsageError(
        f"artifact {item.name}: {item.format} holds the codes of another artifact, {takes}: there is none",
        f"add `- {{{wanted}}}` to the artifacts, merged onto the same base and with the same options"
        + "".join(f", or give it {option}" for option in others),
    )


def _dense_source(inputs: Inputs, item: ArtifactRecipe, artifacts: tuple[ArtifactPlan, ...]) -> ArtifactPlan:
    onto = inputs.onto(item)
    source = next((found for found in artifacts if not found.form.quantises and found.onto == onto), None)
    if source is None:
        raise UsageError(
            f"artifact {item.name}: {item.format} is exported from a dense artifact merged onto {onto}, there is none",
            "add `- format: bf16` to the artifacts",
        )
    return source


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
    digests = {text: CarriedFile(text, source=path).sha256() for text, path in paths.items() if path.is_file()}
    return {**recipe.calibration.model_dump(), "sha256": digests}
