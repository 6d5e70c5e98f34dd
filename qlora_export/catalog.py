"""What stands behind each door: a name and the `module:object` that is loaded when it is asked for."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

from qlora_export.errors import UsageError

FORMATS = {
    "fp32": "qlora_export.formats.dense:fp32",
    "bf16": "qlora_export.formats.dense:bf16",
    "fp16": "qlora_export.formats.dense:fp16",
    "nf4": "qlora_export.formats.bitsandbytes.four_bit:nf4",
    "fp4": "qlora_export.formats.bitsandbytes.four_bit:fp4",
    "int8": "qlora_export.formats.bitsandbytes.int8:int8",
    "w4a16": "qlora_export.formats.compressed_tensors.integers:w4a16",
    "w8a16": "qlora_export.formats.compressed_tensors.integers:w8a16",
    "w8a8": "qlora_export.formats.compressed_tensors.integers:w8a8",
    "fp8": "qlora_export.formats.compressed_tensors.fp8:fp8",
    "fp8-block": "qlora_export.formats.compressed_tensors.fp8_block:fp8_block",
    "nvfp4a16": "qlora_export.formats.compressed_tensors.fp4:nvfp4a16",
    "mxfp4a16": "qlora_export.formats.compressed_tensors.fp4:mxfp4a16",
    "gptq": "qlora_export.formats.gptq_awq:gptq",
    "awq": "qlora_export.formats.gptq_awq:awq",
    "nf4-adapter": "qlora_export.formats.bitsandbytes.four_bit:nf4_adapter",
    "nf4-lowrank": "qlora_export.formats.bitsandbytes.low_rank_correction:nf4_lowrank",
}
DENSE_FORMATS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
EXPORTERS = {
    "adapter": "qlora_export.exporters.adapter:alone",
    "onnx-int4": "qlora_export.exporters.onnx.artifacts:int4",
    "onnx-int8": "qlora_export.exporters.onnx.artifacts:int8",
    "onnx-nf4-adapter": "qlora_export.exporters.onnx.artifacts:nf4_adapter",
    "onnx-fp16": "qlora_export.exporters.onnx.artifacts:fp16",
    "onnx-fp32": "qlora_export.exporters.onnx.artifacts:fp32",
}
RUNTIMES = {
    "transformers": "qlora_export.runtimes.transformers:TransformersRuntime",
    "onnxruntime": "qlora_export.runtimes.onnxruntime:OnnxRuntime",
    "gguf": "qlora_export.runtimes.gguf:GgufRuntime",
}
PUBLISHERS = {
    "folder": "qlora_export.publish.folder:open_registry",
    "hub": "qlora_export.publish.hub.publisher:open_hub",
}


def require_known(table: dict[str, str], kind: str, name: str) -> None:
    """Raise UsageError with the nearest known name when `name` is not in the table."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(table)}"
        raise UsageError(f"unknown {kind} {name!r}", hint)


def load(table: dict[str, str], kind: str, name: str) -> Any:
    """What a table names; raises UsageError with the nearest known name where it names no such thing."""
    require_known(table, kind, name)
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
