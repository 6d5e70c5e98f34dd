"""The ONNX artifacts of the catalog, each made from its options and, where the recipe states one, a rounding."""

from __future__ import annotations

from qlora_export.errors import UsageError
from qlora_export.exporters.onnx.built import BuiltExporter, BuiltOptions
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

# Of each: bytes a weight, and the options of a graph that is built.
BUILT: dict[str, tuple[float, type[BuiltOptions]]] = {
    "onnx-fp32": (4.1, Float32Options),
    "onnx-fp16": (2.1, Float16Options),
    "onnx-int4": (0.8, IntegerOptions),
    "onnx-int8": (1.3, Int8Options),
}
SAME_INTEGERS: tuple[Rounding, ...] = ("nearest", "search", "calibrated", "tuned")


def fp32(options: Options, rounding: Rounding | None) -> BuiltExporter:
    """Float32 weights and activations."""
    _require_unrounded("onnx-fp32", rounding)
    return _built("onnx-fp32", options)


def fp16(options: Options, rounding: Rounding | None) -> BuiltExporter:
    """Float16 weights and activations."""
    _require_unrounded("onnx-fp16", rounding)
    return _built("onnx-fp16", options)


def int4(options: Options, rounding: Rounding | None) -> BuiltExporter | SameIntegersExporter:
    """4-bit integers: the builder's own, or with a rounding those of `w4a16`, `gptq` or `awq`."""
    if rounding is None:
        return _built("onnx-int4", options)
    return _same_integers("onnx-int4", SameInteger4Options, options, rounding, SOURCES_OF_INT4)


def int8(options: Options, rounding: Rounding | None) -> BuiltExporter | SameIntegersExporter:
    """8-bit integers: the builder's own, or with a rounding those of `w8a16`."""
    if rounding is None:
        return _built("onnx-int8", options)
    return _same_integers("onnx-int8", SameIntegerOptions, options, rounding, ("w8a16",))


def nf4_adapter(options: Options, rounding: Rounding | None) -> Nf4AdapterExporter:
    """The NF4 base of training with the adapter beside it."""
    _require_unrounded("onnx-nf4-adapter", rounding)
    return Nf4AdapterExporter(options=chosen("onnx-nf4-adapter", Nf4Options, options))


def _built(name: str, options: Options) -> BuiltExporter:
    size, kind = BUILT[name]
    precision = name.removeprefix("onnx-")
    return BuiltExporter(name=name, precision=precision, bytes_per_weight=size, options=chosen(name, kind, options))


def _same_integers(
    name: str, kind: type[SameIntegerOptions], options: Options, rounding: Rounding, sources: tuple[str, ...]
) -> SameIntegersExporter:
    """The first source is the usual one."""
    if rounding not in SAME_INTEGERS:
        known = ", ".join(SAME_INTEGERS)
        hint = f"with {known} it holds the integers of {sources[0]}, without a rounding those of the builder"
        raise UsageError(f"{name} is not rounded {rounding}", hint)
    stated = chosen(name, kind, options)
    return SameIntegersExporter(
        name=name,
        takes=getattr(stated, "integers", sources[0]),
        bytes_per_weight=BUILT[name][0],
        options=stated,
        rounding=rounding,
        sources=sources,
    )


def _require_unrounded(name: str, rounding: Rounding | None) -> None:
    if rounding is not None:
        raise UsageError(f"{name} is exported as it is, so there is nothing to be {rounding}", "leave `rounding` out")
