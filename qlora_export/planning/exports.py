"""Exports in a plan: which artifact each is made from, how large it will be, and what decides its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from qlora_export._version import __version__
from qlora_export.errors import UsageError
from qlora_export.exporters.base import Exporter, RoundedExporter
from qlora_export.merge.companion_files import beside_sha256, merged_config
from qlora_export.planning.inputs import Inputs
from qlora_export.planning.plan import ArtifactPlan, ExportPlan
from qlora_export.planning.resolve import ResolvedExport
from qlora_export.recipe.config import ArtifactRecipe


def plan_export(inputs: Inputs, export: ResolvedExport, artifacts: tuple[ArtifactPlan, ...]) -> ExportPlan:
    """An export from the first artifact that its exporter can start from, or from the adapter."""
    item, exporter = export.recipe, export.exporter
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
