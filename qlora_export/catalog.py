"""What stands behind each door, by name: the one table of formats, and those of exporters, runtimes and publishers.

Words only: a recipe is read and help is printed without loading what they name. A new format or exporter is its file
and its row here.
"""

from __future__ import annotations

import difflib
from collections import ChainMap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Literal

from qlora_export.errors import UsageError


@dataclass(frozen=True)
class FormatInfo:
    """What is told of a format or an exporter without loading it.

    `module` is the `module:object` that makes it, `summary` its line in the list of formats. The rest is for whoever
    loads what it made: the `weights` in words, the `library` and the `base_model_relation` as the Hub spells them, the
    `packages` to install, `tags`, whether vLLM serves the folder as it is, and the adapter that lies `beside` the
    weights in a folder of its own: the one that was trained, or a correction of what rounding left wrong.
    """

    module: str
    summary: str
    weights: str
    library: Literal["transformers", "peft", "onnx"]
    base_model_relation: Literal["finetune", "quantized", "adapter"]
    packages: tuple[str, ...]
    tags: tuple[str, ...] = ()
    served_by_vllm: bool = False
    beside: Literal["adapter", "correction"] | None = None


TRANSFORMERS = ("transformers", "accelerate")
_dense = partial(
    FormatInfo, library="transformers", base_model_relation="finetune", packages=TRANSFORMERS, served_by_vllm=True
)
_quantised = partial(FormatInfo, library="transformers", base_model_relation="quantized")
_bitsandbytes = partial(_quantised, packages=(*TRANSFORMERS, "bitsandbytes"))
_compressed = partial(_quantised, packages=(*TRANSFORMERS, "compressed-tensors"), served_by_vllm=True)
_interleaved = partial(_quantised, packages=(*TRANSFORMERS, "optimum", "gptqmodel"), served_by_vllm=True)
# Not transformers', although it opens the root of these folders: its snippet would hand out the weights without the
# adapter, in silence, and peft's stops with an error instead.
_peft = partial(FormatInfo, library="peft", packages=(*TRANSFORMERS, "bitsandbytes", "peft"))
_onnx = partial(FormatInfo, library="onnx", packages=("onnxruntime-genai", "huggingface_hub"), tags=("onnx",))

# A row tells what makes it, what it is, and what its users must know; the formatter would give every word a line.
# fmt: off
FORMATS = {
    "fp32": _dense("qlora_export.formats.dense:fp32",
        "merged, dense float32",
        "float32"),
    "bf16": _dense("qlora_export.formats.dense:bf16",
        "merged, dense bfloat16: for serving at full size and for further quantisation",
        "bfloat16"),
    "fp16": _dense("qlora_export.formats.dense:fp16",
        "merged, dense float16; a value beyond 65504 stops the build",
        "float16"),
    "nf4": _bitsandbytes("qlora_export.formats.bitsandbytes.four_bit:nf4",
        "merged, dithered onto the NF4 grid of training: small; docs/rounding.md has its other roundings",
        "bitsandbytes NF4 (4 bits)", tags=("bitsandbytes", "4-bit")),
    "fp4": _bitsandbytes("qlora_export.formats.bitsandbytes.four_bit:fp4",
        "merged, rounded to the nearest bitsandbytes FP4 code: as small as nf4, and coarser",
        "bitsandbytes FP4 (4 bits)", tags=("bitsandbytes", "4-bit")),
    "int8": _bitsandbytes("qlora_export.formats.bitsandbytes.int8:int8",
        "merged, bitsandbytes LLM.int8: one scale a row",
        "bitsandbytes int8 (8 bits)", tags=("bitsandbytes", "8-bit")),
    "w4a16": _compressed("qlora_export.formats.compressed_tensors.integers:w4a16",
        "merged, packed 4-bit integers in groups of 128 for vLLM; options group_size and symmetric",
        "packed 4-bit integers", tags=("compressed-tensors", "4-bit")),
    "w8a16": _compressed("qlora_export.formats.compressed_tensors.integers:w8a16",
        "merged, packed 8-bit integers for vLLM, one scale a row; nearly lossless",
        "packed 8-bit integers", tags=("compressed-tensors", "8-bit")),
    "w8a8": _compressed("qlora_export.formats.compressed_tensors.integers:w8a8",
        "merged, 8-bit integers for vLLM, activations in 8 bits too: fast on GPUs without FP8",
        "8-bit integers, activations too while it runs", tags=("compressed-tensors", "8-bit")),
    "fp8": _compressed("qlora_export.formats.compressed_tensors.fp8:fp8",
        "merged, float8_e4m3 for vLLM, activations in FP8 too: fast on GPUs with FP8",
        "FP8 (e4m3), activations too while it runs", tags=("compressed-tensors", "fp8")),
    "fp8-block": _compressed("qlora_export.formats.compressed_tensors.fp8_block:fp8_block",
        "merged, float8_e4m3 for vLLM, one scale for 128 x 128 weights and for 128 activations",
        "FP8 (e4m3) in blocks of 128 x 128, activations too while it runs", tags=("compressed-tensors", "fp8")),
    "nvfp4a16": _compressed("qlora_export.formats.compressed_tensors.fp4:nvfp4a16",
        "merged, 4-bit floats in groups of 16 (NVFP4) for vLLM, activations in 16 bits; option global_scale",
        "4-bit floats (NVFP4)", tags=("compressed-tensors", "nvfp4")),
    "mxfp4a16": _compressed("qlora_export.formats.compressed_tensors.fp4:mxfp4a16",
        "merged, 4-bit floats in groups of 32 (MXFP4) for vLLM, activations in 16 bits",
        "4-bit floats (MXFP4)", tags=("compressed-tensors", "mxfp4")),
    "gptq": _interleaved("qlora_export.formats.gptq_awq:gptq",
        "merged, 4-bit integers in GPTQ's layout for vLLM and ONNX Runtime GenAI; option group_size 32, 64 or 128",
        "4-bit integers (GPTQ)", tags=("gptq", "4-bit")),
    "awq": _interleaved("qlora_export.formats.gptq_awq:awq",
        "merged, 4-bit integers with zero points in AWQ's layout; option group_size 32, 64 or 128",
        "4-bit integers (AWQ)", tags=("awq", "4-bit")),
    "nf4-adapter": _peft("qlora_export.formats.bitsandbytes.four_bit:nf4_adapter",
        "the NF4 base of training with the adapter beside it: loses nothing",
        "bitsandbytes NF4 (4 bits)", base_model_relation="quantized", beside="adapter",
        tags=("bitsandbytes", "4-bit", "lora")),
    "nf4-lowrank": _peft("qlora_export.formats.bitsandbytes.low_rank_correction:nf4_lowrank",
        "merged, NF4 by calibration, a LoRA adapter corrects what is left; option correction_bits or rank",
        "bitsandbytes NF4 (4 bits)", base_model_relation="quantized", beside="correction",
        tags=("bitsandbytes", "4-bit", "lora")),
}
EXPORTERS = {
    "adapter": _peft("qlora_export.exporters.adapter:alone",
        "the adapter on its own, for the base it was trained on",
        "the adapter's own", base_model_relation="adapter", tags=("lora",)),
    "onnx-int4": _onnx("qlora_export.exporters.onnx.artifacts:int4",
        "merged, ONNX with 4-bit matrices for ONNX Runtime GenAI; rounded: those of w4a16, gptq or awq",
        "ONNX with 4-bit integers", base_model_relation="quantized"),
    "onnx-int8": _onnx("qlora_export.exporters.onnx.artifacts:int8",
        "merged, ONNX with 8-bit matrices for ONNX Runtime GenAI; with a rounding, the integers of w8a16",
        "ONNX with 8-bit integers", base_model_relation="quantized"),
    "onnx-nf4-adapter": _onnx("qlora_export.exporters.onnx.artifacts:nf4_adapter",
        "the NF4 base of training in ONNX with the adapter beside it, for ONNX Runtime GenAI",
        "ONNX with NF4 (4 bits), the adapter beside it", base_model_relation="quantized"),
    "onnx-fp16": _onnx("qlora_export.exporters.onnx.artifacts:fp16",
        "merged, ONNX in float16 for ONNX Runtime GenAI; needs the extra [onnx]",
        "ONNX in float16", base_model_relation="finetune"),
    "onnx-fp32": _onnx("qlora_export.exporters.onnx.artifacts:fp32",
        "merged, ONNX in float32 for ONNX Runtime GenAI; needs the extra [onnx]",
        "ONNX in float32", base_model_relation="finetune"),
}
# fmt: on
# Everything that a recipe can ask for: formats first, then exporters.
ARTIFACTS = ChainMap(EXPORTERS, FORMATS)
DENSE_FORMATS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
RUNTIMES = {
    "transformers": "qlora_export.runtimes.transformers:TransformersRuntime",
    "onnxruntime": "qlora_export.runtimes.onnxruntime:OnnxRuntime",
    "gguf": "qlora_export.runtimes.gguf:GgufRuntime",
}
PUBLISHERS = {
    "folder": "qlora_export.publish.folder:open_registry",
    "hub": "qlora_export.publish.hub.publisher:open_hub",
}


def require_known(known: Collection[str], kind: str, name: str) -> None:
    """Raise UsageError with the nearest known name when `name` is not among them."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise UsageError(f"unknown {kind} {name!r}", hint)


def load(table: Mapping[str, str | FormatInfo], kind: str, name: str) -> Any:
    """What a table names; raises UsageError with the nearest known name where it names no such thing."""
    require_known(table, kind, name)
    row = table[name]
    module, _, attribute = (row if isinstance(row, str) else row.module).partition(":")
    return getattr(import_module(module), attribute)
