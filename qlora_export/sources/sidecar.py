"""The sidecar `qlora_export.json` of an adapter folder: how the base was quantised while the adapter was trained.

    {"schema": 1,
     "quantization": {"quant_type", "block_size", "double_quant", "storage_dtype", "compute_dtype",
                      "weight_roundings", "exact_nested"},
     "base": {"headers_sha256"},
     "modules": {NAME: {"codes_sha256", "absmax_sha256", "nested_offset"}},
     "versions": {PACKAGE: VERSION}}

dtypes carry torch's names. `absmax_sha256` is over the bytes of the 8-bit codes, the nested absmax and the offset
(or of the float32 absmax without double quantisation), all little-endian. Without a sidecar, NF4 in blocks of 64 with
double quantisation, loaded and computed in bf16, is assumed, and the plan says so.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from qlora_export.errors import InputError
from qlora_export.quant.floats import Float32, UInt8
from qlora_export.sources.checkpoint import read_json
from qlora_export.types import BLOCK_SIZES, FROM_TORCH_NAMES, TORCH_NAMES, TrainedModule, TrainingQuantization

SIDECAR_NAME = "qlora_export.json"


def read_sidecar(folder: Path) -> TrainingQuantization:
    """The recorded training quantisation of an adapter folder, or the documented default when there is none."""
    path = folder / SIDECAR_NAME
    if not os.path.lexists(path):
        return TrainingQuantization()
    data = read_json(path)
    if data.get("schema") != 1:
        raise InputError(f"{path}: schema {data.get('schema')!r}, this version reads 1", "update qlora-export")
    try:
        training = _parse(data)
        _check(training)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: {type(error).__name__} at {error}", "write it again with training.record") from None
    return training


def _check(training: TrainingQuantization) -> None:
    """Raise ValueError for facts that no training can have had."""
    if not training.modules:
        raise ValueError("no module was quantised")
    if training.block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size {training.block_size}, bitsandbytes knows {BLOCK_SIZES}")
    for name, module in training.modules.items():
        if (module.nested_offset is None) == training.double_quant:
            raise ValueError(f"nested_offset of {name} does not agree with double_quant")
        if module.nested_offset is not None and not math.isfinite(module.nested_offset):
            raise ValueError(f"nested_offset of {name} is {module.nested_offset}")


def write_sidecar(folder: Path, training: TrainingQuantization) -> Path:
    """Write the sidecar of an adapter folder."""
    quantization = {
        "quant_type": training.quant_type,
        "block_size": training.block_size,
        "double_quant": training.double_quant,
        "storage_dtype": TORCH_NAMES[training.storage_dtype],
        "compute_dtype": TORCH_NAMES[training.compute_dtype],
        "weight_roundings": [TORCH_NAMES[dtype] for dtype in training.weight_roundings],
        "exact_nested": training.exact_nested,
    }
    modules = {
        name: {
            "codes_sha256": module.codes_sha256,
            "absmax_sha256": module.absmax_sha256,
            "nested_offset": module.nested_offset,
        }
        for name, module in sorted(training.modules.items())
    }
    data = {
        "schema": 1,
        "quantization": quantization,
        "base": {"headers_sha256": training.base_sha256},
        "modules": modules,
        "versions": dict(training.versions),
    }
    path = folder / SIDECAR_NAME
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return path


def absmax_sha256(codes: UInt8, nested_absmax: Float32, offset: np.float32) -> str:
    """Digest of a double-quantised absmax state."""
    digest = hashlib.sha256(codes.tobytes())
    digest.update(nested_absmax.tobytes())
    digest.update(np.float32(offset).tobytes())
    return digest.hexdigest()


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r}, expected true or false")
    return value


def _parse(data: dict[str, Any]) -> TrainingQuantization:
    quantization = data["quantization"]
    return TrainingQuantization(
        quant_type=str(quantization["quant_type"]),
        block_size=int(quantization["block_size"]),
        double_quant=_boolean(quantization["double_quant"]),
        storage_dtype=FROM_TORCH_NAMES[quantization["storage_dtype"]],
        compute_dtype=FROM_TORCH_NAMES[quantization["compute_dtype"]],
        weight_roundings=tuple(FROM_TORCH_NAMES[name] for name in quantization["weight_roundings"]),
        exact_nested=_boolean(quantization["exact_nested"]),
        base_sha256=data["base"]["headers_sha256"],
        modules={
            name: TrainedModule(module["codes_sha256"], module["absmax_sha256"], module["nested_offset"])
            for name, module in data["modules"].items()
        },
        versions=dict(data["versions"]),
        provenance="sidecar",
    )
