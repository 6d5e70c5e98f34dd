"""What an exporter cannot make of this model or this adapter, told before anything is built."""

from __future__ import annotations

from qlora_export.errors import ExitCode, Problem, UsageError
from qlora_export.merge.changes import AddedVector, Change, LowRank, Magnitude, ReplacedRows
from qlora_export.merge.companion_files import merged_config
from qlora_export.planning.inputs import Inputs
from qlora_export.recipe.config import ArtifactRecipe

BLOCKS_OF_BNB4 = (16, 32, 64, 128, 256)
CHANGES = {Magnitude: "DoRA's magnitude", AddedVector: "a trained bias", ReplacedRows: "trained tokens"}
MERGE_INSTEAD = "choose a merged format: onnx-int4 or onnx-fp32"


def export_problems(inputs: Inputs) -> list[Problem]:
    """Architectures that an exporter lacks, and adapters that cannot stay beside its base."""
    problems = []
    config = merged_config(inputs.checkpoint.config, "bfloat16", inputs.model.settings)
    for item, exporter in ((found.recipe, found.made) for found in inputs.exports):
        if isinstance(exporter, UsageError):
            continue  # told elsewhere
        if (what := exporter.obstacle(config)) is not None:
            problems.append(_refused(item, what, "or choose a safetensors format, which holds any architecture"))
        if exporter.takes not in ("dense", "adapter") and inputs.facts.experts:
            what = f"{item.format}: the builder's graph has no products to put the codes of experts into"
            problems.append(_refused(item, what, "choose onnx-fp32, or a safetensors format"))
        if exporter.takes == "nf4-adapter" and item.onto == "original":
            what = f"artifact {item.name}: {item.format} ships the base of training as it was"
            problems.append(Problem(ExitCode.USAGE, what, "leave `onto` out"))
        if exporter.takes == "nf4-adapter":
            problems += [_refused(item, what, MERGE_INSTEAD) for what in _beside_problems(inputs)]
    return problems


def _beside_problems(inputs: Inputs) -> list[str]:
    """Why the adapter is no pair of factors beside each layer of a 4-bit base; every kind of reason once."""
    found: dict[str, str] = {}
    for output in inputs.model.outputs.values():
        if output.changes and output.spec.module not in inputs.facts.encodable:
            found.setdefault("dense", f"the adapter changes {output.name}, which was not in 4 bits in training")
        if inputs.checkpoint.weights.get(output.source.spec.name) is not output.source:
            found.setdefault("saved", f"{output.name} was trained whole (modules_to_save)")
        for kind in filter(None, map(_not_plain, output.changes)):
            found.setdefault(kind, f"{output.name} has {kind}, which is no plain LoRA")
    if (block := inputs.training.block_size) not in BLOCKS_OF_BNB4:
        found["block"] = f"training had blocks of {block}, MatMulBnb4 has {BLOCKS_OF_BNB4}"
    return list(found.values())


def _not_plain(change: Change) -> str | None:
    """What a change is, where it is not the product of two whole factors."""
    if not isinstance(change, LowRank):
        return CHANGES.get(type(change), type(change).__name__)
    if change.experts is not None:
        return "factors over packed experts"
    if change.blocks != (1, 1):
        return "block-diagonal factors"
    return "factors of a transposed layer" if change.transposed else None


def _refused(item: ArtifactRecipe, what: str, hint: str) -> Problem:
    return Problem(ExitCode.REFUSED, f"artifact {item.name}: {what}", hint)
