"""What stands behind each door: a name and the `module:object` that is loaded when it is asked for."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import signature
from types import MappingProxyType
from typing import Any, cast

from qlora_export.contracts import Exporter, Format, Options, Publisher, Rounding, Runtime, TrainingQuantization
from qlora_export.errors import UsageError

FORMATS = {
    "fp32": "qlora_export.formats.dense:fp32",
    "bf16": "qlora_export.formats.dense:bf16",
    "fp16": "qlora_export.formats.dense:fp16",
    "nf4": "qlora_export.formats.four_bit:nf4",
    "fp4": "qlora_export.formats.four_bit:fp4",
    "int8": "qlora_export.formats.int8:int8",
    "w4a16": "qlora_export.formats.compressed.integers:w4a16",
    "w8a16": "qlora_export.formats.compressed.integers:w8a16",
    "w8a8": "qlora_export.formats.compressed.integers:w8a8",
    "fp8": "qlora_export.formats.compressed.float8:fp8",
    "fp8-block": "qlora_export.formats.compressed.float8_blocks:fp8_block",
    "nvfp4a16": "qlora_export.formats.compressed.float4:nvfp4a16",
    "mxfp4a16": "qlora_export.formats.compressed.float4:mxfp4a16",
    "gptq": "qlora_export.formats.gptq_awq:gptq",
    "awq": "qlora_export.formats.gptq_awq:awq",
    "nf4-adapter": "qlora_export.formats.four_bit:nf4_adapter",
    "nf4-lowrank": "qlora_export.formats.four_bit_corrected:nf4_lowrank",
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
NO_OPTIONS: Options = MappingProxyType({})


def load_format(name: str, training: TrainingQuantization, options: Options = NO_OPTIONS) -> Format:
    """The format of that name, told how the base was quantised in training; its options are keywords of its maker.

    Raises UsageError for options that it does not have.
    """
    make = _load(FORMATS, "format", name)
    known = [item.name for item in signature(make).parameters.values() if item.kind is item.KEYWORD_ONLY]
    for option in options:
        if not known:
            raise UsageError(f"{name} has no options")
        if option not in known:
            raise UsageError(f"{name} has no option {option!r}; known: {', '.join(known)}")
    return cast(Format, make(training, **options))


def mix(main: Format, others: Mapping[str, Format], names: Mapping[str, tuple[str, ...]]) -> Format:
    """A format with others for some modules; raises UsageError for those that do not go together in one folder."""
    return cast(Format, import_module("qlora_export.formats.mixed").mix(main, others, names))


def load_exporter(name: str, options: Options, rounding: Rounding | None = None) -> Exporter:
    """The exporter of that name with its options; raises UsageError where it takes over no integers so rounded."""
    return cast(Exporter, _load(EXPORTERS, "format", name)(options, rounding))


def load_runtime(name: str) -> Runtime:
    """The runtime of that name."""
    return cast(Runtime, _load(RUNTIMES, "runtime", name)())


def load_publisher(to: str) -> Callable[..., Publisher]:
    """What opens a destination `KIND:PLACE`, given the recipe, the run folder and the environment to publish in."""
    kind, _, _ = to.partition(":")
    return cast(Callable[..., Publisher], _load(PUBLISHERS, "publisher", kind))


def require_known(table: dict[str, str], kind: str, name: str) -> None:
    """Raise UsageError with the nearest known name when `name` is not in the table."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(table)}"
        raise UsageError(f"unknown {kind} {name!r}", hint)


def _load(table: dict[str, str], kind: str, name: str) -> Any:
    require_known(table, kind, name)
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
