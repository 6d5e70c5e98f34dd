"""Folders of compressed-tensors whose 4-bit groups have zero points, decoded here.

    words `x.weight_packed` int32 [out, in / 8] and `x.weight_zero_point` int32 [ceil(out / 8), groups], down the rows
    w[out, in] = (nibble - zero) * scale, rounded once to the model's dtype; both are stored 8 above what they stand for

transformers 5.23 makes zero points [out, groups] and refuses the packed ones that the library writes and vLLM reads.
Source: compressed-tensors `compressors/pack_quantized`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_export.errors import InputError
from qlora_export.runtimes.decoded import BUILD_AGAIN, Tensors, load_decoded, nibbles, parts_of

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
EXPECTED = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": False}


def is_asymmetric(stated: Mapping[str, Any]) -> bool:
    """Whether a quantization_config states packed groups with zero points."""
    if stated.get("quant_method") != "compressed-tensors":
        return False
    return any(group["weights"].get("symmetric") is False for group in _groups(stated))


def load_asymmetric(folder: Path) -> Any:
    """The model with dense weights; raises InputError for a folder that is not as it states."""

    def decode(tensors: Tensors, stated: Mapping[str, Any], dtype: torch.dtype) -> Tensors:
        _require_known(folder, stated)
        return decoded(tensors, dtype)

    return load_decoded(folder, decode)


def decoded(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """All tensors, with `x.weight` [out, in] of this dtype for the parts of each `x`; empties what it is given."""
    dense: Tensors = {}
    for module in [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]:
        parts = parts_of(tensors, module, PARTS, "weight_packed")
        rows, columns = (int(size) for size in parts["weight_shape"])
        scales = parts["weight_scale"].float()
        size = columns // scales.shape[1]
        codes = nibbles(parts["weight_packed"])[:, :columns]
        zeros = nibbles(parts["weight_zero_point"].T.contiguous()).T[:rows]
        values = (codes - zeros.repeat_interleave(size, 1)) * scales.repeat_interleave(size, 1)
        dense[f"{module}.weight"] = values.to(dtype)
    return {**tensors, **dense}


def _require_known(folder: Path, stated: Mapping[str, Any]) -> None:
    groups = _groups(stated)
    if len(groups) != 1:
        raise InputError(f"{folder}: quantization_config has {len(groups)} groups, expected 1", BUILD_AGAIN)
    (group,) = groups
    if group.get("input_activations") is not None:
        raise InputError(f"{folder}: quantization_config rounds activations, expected none", BUILD_AGAIN)
    for key, value in EXPECTED.items():
        if group["weights"].get(key) != value:
            what = f"has {key} {group['weights'].get(key)!r}, expected {value!r}"
            raise InputError(f"{folder}: quantization_config {what}", BUILD_AGAIN)


def _groups(stated: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = stated.get("config_groups")
    groups = found.values() if isinstance(found, dict) else ()
    return [group for group in groups if isinstance(group, dict) and isinstance(group.get("weights"), dict)]
