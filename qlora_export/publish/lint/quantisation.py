"""quantization_config against the tensors: the method, its kind, double quantisation, and what it says stays dense.

Of compressed-tensors: whether each scale has codes of the stated format beside it. Of GPTQ and AWQ: whether words, zero
points and scales are all there and have the shapes of the stated method and group.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qlora_export.errors import Problem
from qlora_export.publish.lint.rules import finding
from qlora_export.sources.weights import FourBitWeight, PlainWeight, Weight
from qlora_export.tensors.dtypes import FLOATS
from qlora_export.tensors.header import StoredTensor

BUILD_AGAIN = "build the artifact again; config.json and weights do not belong together"
# Parts that only quantised weights have, whoever packed them.
MARKS = (
    ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_global_scale", ".weight_scale_inv", ".qweight",
    ".qzeros", ".g_idx", ".absmax", ".quant_map", ".SCB",
)  # fmt: skip

# Codes of each format of compressed-tensors: the end of their name after the module's, and their dtype.
COMPRESSED = {
    "pack-quantized": (".weight_packed", "I32"),
    "int-quantized": (".weight", "I8"),
    "float-quantized": (".weight", "F8_E4M3"),
    "nvfp4-pack-quantized": (".weight_packed", "U8"),
    "mxfp4-pack-quantized": (".weight_packed", "U8"),
}
SCALES = ".weight_scale"
MIXED = "mixed-precision"


def quantisation_problems(
    path: str, config: Mapping[str, Any], weights: Mapping[str, Weight], tensors: Mapping[str, StoredTensor]
) -> Iterator[Problem]:
    """Where config.json and the tensors do not tell the same of how weights are quantised."""
    for what in _differences(config.get("quantization_config"), weights, tensors):
        yield finding("config", path, what, BUILD_AGAIN)


def _differences(stated: object, weights: Mapping[str, Weight], tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    quantised = [weight for weight in weights.values() if weight.storage != "plain"]
    kinds = {weight.storage for weight in quantised}
    packed = next((name for name in tensors if name.endswith(MARKS)), None)
    if stated is None:
        if first := quantised[0].spec.name if quantised else packed:
            yield f"has no quantization_config, and {first} is stored quantised"
        return
    if not isinstance(stated, Mapping):
        yield f"quantization_config is {stated!r}, expected a table"
        return
    method, expected = stated.get("quant_method"), _expected(stated)
    if not kinds and packed is None and all(tensor.spec.dtype in FLOATS for tensor in tensors.values()):
        yield f"has a quantization_config ({method}), and every weight is stored dense"
    elif (expected is not None and kinds != {expected}) or (expected is None and kinds):
        found = ", ".join(sorted(kinds)) or "of another kind"
        yield f"says {expected or method}, the quantised weights are {found}"
    elif method == "bitsandbytes":
        yield from _bitsandbytes(stated, weights)
    elif method == "compressed-tensors":
        yield from _compressed(stated, tensors)
    elif method in ("gptq", "awq"):
        yield from _interleaved(stated, tensors)


def _expected(stated: Mapping[str, Any]) -> str | None:
    """The kind of storage that a loader of this method expects; None for methods whose tensors are read as they are."""
    if stated.get("quant_method") == "fp8":
        return "fp8"
    if stated.get("quant_method") != "bitsandbytes":
        return None
    return "int8" if stated.get("load_in_8bit") else str(stated.get("bnb_4bit_quant_type", "fp4"))


def _bitsandbytes(stated: Mapping[str, Any], weights: Mapping[str, Weight]) -> Iterator[str]:
    double = bool(stated.get("bnb_4bit_use_double_quant", False))
    skipped = stated.get("llm_int8_skip_modules") or []
    for weight in weights.values():
        if isinstance(weight, FourBitWeight) and (weight.offset is not None) != double:
            have = "nested" if weight.offset is not None else "plain"
            yield f"says bnb_4bit_use_double_quant {double}, the absmax of {weight.spec.name} is {have}"
            return
    for weight in weights.values():
        if not isinstance(weight, PlainWeight) and weight.spec.module in skipped:
            yield f"skips {weight.spec.module} in quantisation, and it is stored quantised"
            return


def _compressed(stated: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    ignored = stated.get("ignore") or []
    for module in (name.removesuffix(SCALES) for name in tensors if name.endswith(SCALES)):
        layout = _layout_of(module, stated)
        if layout not in COMPRESSED:
            continue
        suffix, dtype = COMPRESSED[layout]
        codes = tensors.get(module + suffix)
        if codes is None or codes.spec.dtype != dtype:
            yield f"says {layout}, {module}{SCALES} has no {suffix[1:]} of {dtype} beside it"
            return
        if module in ignored:
            yield f"ignores {module} in quantisation, and it is stored quantised"
            return


def _layout_of(module: str, stated: Mapping[str, Any]) -> str:
    """The layout of a module: of the group that names it, else of the table, else of the group of all others."""
    groups = [group for group in (stated.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    named = [group for group in groups if module in (group.get("targets") or ())]
    if named or stated.get("format") == MIXED:
        rest = [group for group in groups if "Linear" in (group.get("targets") or ())]
        return str(next((group.get("format") for group in (*named, *rest)), None))
    return str(stated.get("format"))


def _interleaved(stated: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """The first module of GPTQ or AWQ whose parts are not what is stated."""
    method, group = stated["quant_method"], stated.get("group_size")
    if not isinstance(group, int) or group < 1:
        yield f"says group_size {group!r}, expected a number of columns"
        return
    skipped = stated.get("modules_to_not_convert") or stated.get("dynamic") or []
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    if not modules:
        yield f"says {method}, and no tensor is a qweight"
    for module in modules:
        found = {name: tensors.get(f"{module}.{name}") for name in ("qweight", "qzeros", "scales")}
        shapes = {name: tensor.spec.shape for name, tensor in found.items() if tensor is not None}
        if shapes != _expected_shapes(method, group, shapes["qweight"]):
            yield f"says {method} in groups of {group}, {module} has {_told(shapes)}"
            return
        if module in skipped or f"-:^{re.escape(module)}$" in skipped:
            yield f"skips {module} in quantisation, and it is stored quantised"
            return


def _expected_shapes(method: str, group: int, words: tuple[int, ...]) -> dict[str, tuple[int, ...]] | None:
    """The shapes of a module by its words of eight codes; None where these are no matrix."""
    if len(words) != 2:
        return None
    inputs, outputs = (8 * words[0], words[1]) if method == "gptq" else (words[0], 8 * words[1])
    return {"qweight": words, "qzeros": (inputs // group, outputs // 8), "scales": (inputs // group, outputs)}


def _told(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
