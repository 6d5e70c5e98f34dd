"""What can be made: every format of the catalog in one line, with its size and the runtime that opens it.

The size is measured on the parts that a square weight of 4096 rows becomes; an exporter states its own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from rich.markup import escape
from rich.table import Table

from qlora_export import catalog
from qlora_export.exporters.registry import load_exporter
from qlora_export.formats.registry import load_format
from qlora_export.report.terminal import new_table
from qlora_export.tensors.dtypes import ITEM_BYTES
from qlora_export.types import Part, TensorSpec, TrainingQuantization

LINES = {
    "fp32": "merged, dense float32",
    "bf16": "merged, dense bfloat16: for serving at full size and for further quantisation",
    "fp16": "merged, dense float16; a value beyond 65504 stops the build",
    "nf4": "merged, dithered onto the NF4 grid of training: small; docs/rounding.md has its other roundings",
    "fp4": "merged, rounded to the nearest bitsandbytes FP4 code: as small as nf4, and coarser",
    "int8": "merged, bitsandbytes LLM.int8: one scale a row",
    "w4a16": "merged, packed 4-bit integers in groups of 128 for vLLM; options group_size and symmetric",
    "w8a16": "merged, packed 8-bit integers for vLLM, one scale a row; nearly lossless",
    "w8a8": "merged, 8-bit integers for vLLM, activations in 8 bits too: fast on GPUs without FP8",
    "fp8": "merged, float8_e4m3 for vLLM, activations in FP8 too: fast on GPUs with FP8",
    "fp8-block": "merged, float8_e4m3 for vLLM, one scale for 128 x 128 weights and for 128 activations",
    "nvfp4a16": "merged, 4-bit floats in groups of 16 (NVFP4) for vLLM, activations in 16 bits; option global_scale",
    "mxfp4a16": "merged, 4-bit floats in groups of 32 (MXFP4) for vLLM, activations in 16 bits",
    "gptq": "merged, 4-bit integers in GPTQ's layout for vLLM and ONNX Runtime GenAI; option group_size 32, 64 or 128",
    "awq": "merged, 4-bit integers with zero points in AWQ's layout; option group_size 32, 64 or 128",
    "nf4-adapter": "the NF4 base of training with the adapter beside it: loses nothing",
    "nf4-lowrank": "merged, NF4 by calibration, a LoRA adapter corrects what is left; option correction_bits or rank",
    "adapter": "the adapter on its own, for the base it was trained on",
    "onnx-int4": "merged, ONNX with 4-bit matrices for ONNX Runtime GenAI; rounded: those of w4a16, gptq or awq",
    "onnx-int8": "merged, ONNX with 8-bit matrices for ONNX Runtime GenAI; with a rounding, the integers of w8a16",
    "onnx-nf4-adapter": "the NF4 base of training in ONNX with the adapter beside it, for ONNX Runtime GenAI",
    "onnx-fp16": "merged, ONNX in float16 for ONNX Runtime GenAI; needs the extra [onnx]",
    "onnx-fp32": "merged, ONNX in float32 for ONNX Runtime GenAI; needs the extra [onnx]",
}
SAMPLE = TensorSpec("model.layers.0.mlp.up_proj.weight", "BF16", (4096, 4096))


@dataclass(frozen=True)
class Offer:
    """One format: what it is, bytes for a weight of a linear layer where it stores any, and its runtime."""

    format: str
    kind: str
    what: str
    bytes_per_weight: float | None
    runtime: str


def offers() -> list[Offer]:
    """Every format and exporter of the catalog, in its order."""
    return [_format(name) for name in catalog.FORMATS] + [_exporter(name) for name in catalog.EXPORTERS]


def offers_data(found: list[Offer]) -> dict[str, Any]:
    """The offers as JSON."""
    return {"schema": 1, "formats": [asdict(offer) for offer in found]}


def offers_table(found: list[Offer]) -> Table:
    """The offers for people."""
    table = new_table("Formats")
    table.add_column("format", no_wrap=True)
    table.add_column("bytes a weight", justify="right")
    table.add_column("runtime", no_wrap=True)
    table.add_column("what it is")
    for offer in found:
        table.add_row(
            offer.format,
            f"{offer.bytes_per_weight:.3g}" if offer.bytes_per_weight else "",
            offer.runtime,
            escape(offer.what),
        )
    return table


def _format(name: str) -> Offer:
    form = load_format(name, TrainingQuantization())
    size = sum(_part_bytes(part) for part in form.parts(SAMPLE)) / SAMPLE.size
    return Offer(name, "format", LINES[name], round(size, 3), "transformers")


def _part_bytes(part: Part) -> int:
    return prod(part.shape) * ITEM_BYTES[part.dtype]


def _exporter(name: str) -> Offer:
    exporter = load_exporter(name, {})
    return Offer(name, "export", LINES[name], exporter.bytes_per_weight or None, exporter.runtime)
