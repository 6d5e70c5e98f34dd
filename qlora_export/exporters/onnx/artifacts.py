"""The ONNX artifacts of the catalog, each made from its options and, where the recipe states one, a rounding."""

from __future__ import annotations

from qlora_export.errors import UsageError
from qlora_export.exporters.onnx.built import BuiltExporter
from qlora_export.exporters.onnx.integers import SameIntegersExporter
from qlora_export.exporters.onnx.nf4 import Nf4AdapterExporter
from qlora_export.exporters.onnx.options import (
    SOURCES_OF_INT4,
    Float16Options,
    Float32Options,
    Int8Options,
    IntegerOptions,
    Nf4Options,
    SameInteger4Options,
    SameIntegerOptions,
    chosen,
)
from qlora_export.types import Options, Rounding

ROUNDINGS: tuple[Rounding, ...] = ("nearest", "search", "calibrated", "tuned")


def fp32(options: Options, rounding: Rounding | None) -> BuiltExporter:
    """Float32 weights and activations."""
    _require_unrounded("onnx-fp32", rounding)
    return BuiltExporter("onnx-fp32", "fp32", 4.1, chosen("onnx-fp32", Float32Options, options))


def fp16(options: Options, rounding: Rounding | None) -> BuiltExporter:
    """Float16 weights and activations."""
    _require_unrounded("onnx-fp16", rounding)
    return BuiltExporter("onnx-fp16", "fp16", 2.1, chosen("onnx-fp16", Float16Options, options))


def int4(options: Options, rounding: Rounding | None) -> BuiltExporter | SameIntegersExporter:
    """4-bit integers: the builder's own, or with a rounding those of `w4a16`, `gptq` or `awq`."""
    if rounding is not None:
        _require_known("onnx-int4", rounding, "w4a16")
        stated = chosen("onnx-int4", SameInteger4Options, options)
        return SameIntegersExporter("onnx-int4", stated.integers, rounding, 0.8, stated, SOURCES_OF_INT4)
    return BuiltExporter("onnx-int4", "int4", 0.8, chosen("onnx-int4", IntegerOptions, options))


def int8(options: Options, rounding: Rounding | None) -> BuiltExporter | SameIntegersExporter:
    """8-bit integers: the builder's own, or with a rounding those of `w8a16`."""
    if rounding is not None:
        _require_known("onnx-int8", rounding, "w8a16")
        stated = chosen("onnx-int8", SameIntegerOptions, options)
        return SameIntegersExporter("onnx-int8", "w8a16", rounding, 1.3, stated, ("w8a16",))
    return BuiltExporter("onnx-int8", "int8", 1.3, chosen("onnx-int8", Int8Options, options))


def nf4_adapter(options: Options, rounding: Rounding | None) -> Nf4AdapterExporter:
    """The NF4 base of training with the adapter beside it."""
    _require_unrounded("onnx-nf4-adapter", rounding)
    return Nf4AdapterExporter(chosen("onnx-nf4-adapter", Nf4Options, options))


def _require_known(name: str, rounding: Rounding, takes: str) -> None:
    if rounding not in ROUNDINGS:
        hint = f"with {', '.join(ROUNDINGS)} it holds the integers of {takes}, without a rounding those of the builder"
        raise UsageError(f"{name} is not rounded {rounding}", hint)


def _require_unrounded(name: str, rounding: Rounding | None) -> None:
    if rounding is not None:
        raise UsageError(f"{name} is exported as it is, so there is nothing to be {rounding}", "leave `rounding` out")
