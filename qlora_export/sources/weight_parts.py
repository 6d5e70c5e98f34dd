"""Which tensors of a file make up which weight, and whether each is complete, before any row is decoded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from qlora_export.errors import InputError, Refused
from qlora_export.quant import double_quant
from qlora_export.sources.weights import Float8Weight, FourBitWeight, Int8Weight, PlainWeight, Weight
from qlora_export.tensors.dtypes import FLOATS
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import BLOCK_SIZES, FROM_TORCH_NAMES, TensorSpec

STATE_MARK = ".quant_state.bitsandbytes__"
FOUR_BIT_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
SAVE_AGAIN = "save the base again with the library that quantised it"


def weights_of(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, Weight]:
    """The weights that the stored tensors make up, in their order; raises InputError where one is incomplete."""
    owned: set[str] = set()
    weights: dict[str, Weight] = {}
    dtype = _stated_dtype(config)
    with SourceFiles() as files:
        for name, tensor in tensors.items():
            module = name.removesuffix(".weight")
            companions = {key: tensors[f"{name}.{key}"] for key in FOUR_BIT_PARTS if f"{name}.{key}" in tensors}
            state = next(
                (tensors[key] for kind in ("nf4", "fp4") if (key := name + STATE_MARK + kind) in tensors), None
            )
            if state is not None:
                weights[name] = _four_bit(tensor, companions, state, files)
            elif tensor.spec.dtype == "I8" and f"{module}.SCB" in tensors:
                mark = tensors.get(f"{module}.weight_format")
                weights[name] = _int8(tensor, tensors[f"{module}.SCB"], mark, dtype, files)
            elif tensor.spec.dtype == "F8_E4M3" and f"{name}_scale_inv" in tensors:
                weights[name] = _float8(tensor, tensors[f"{name}_scale_inv"], dtype, config)
            else:
                _require_complete(tensor, companions, config)
                weights[name] = PlainWeight(tensor)
                continue
            owned.update(part.spec.name for part in weights[name].stored[1:])
    return {name: weight for name, weight in weights.items() if name not in owned}


def _stated_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that config.json says the model has; BF16 when it does not say."""
    for section in (config, config.get("text_config") or {}):
        named = section.get("dtype") or section.get("torch_dtype")
        if isinstance(named, str) and named in FROM_TORCH_NAMES:
            return FROM_TORCH_NAMES[named]
        if named is not None and not isinstance(named, str):
            raise InputError(f"config.json: dtype is {named!r}, expected a name", "restore config.json")
    return "BF16"


def _require_complete(tensor: StoredTensor, companions: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> None:
    """Raise InputError for codes of bitsandbytes whose scales or state are not there."""
    stated = config.get("quantization_config")
    by_bitsandbytes = isinstance(stated, Mapping) and stated.get("quant_method") == "bitsandbytes"
    if companions or (by_bitsandbytes and tensor.spec.dtype in ("I8", "U8") and tensor.spec.name.endswith(".weight")):
        missing = "SCB" if tensor.spec.dtype == "I8" else "quant_state"
        raise InputError(
            f"{tensor.path}: tensor {tensor.spec.name} is {tensor.spec.dtype} and has no {missing} beside it",
            SAVE_AGAIN,
        )


def _int8(
    tensor: StoredTensor, scales: StoredTensor, mark: StoredTensor | None, dtype: str, files: SourceFiles
) -> Int8Weight:
    rows = tensor.spec.shape[0] if len(tensor.spec.shape) == 2 else -1
    if scales.spec.dtype not in FLOATS or scales.spec.size != rows:
        raise InputError(
            f"{scales.path}: tensor {scales.spec.name} is {scales.spec.dtype} {list(scales.spec.shape)}, "
            f"{list(tensor.spec.shape)} needs {rows} floats",
            SAVE_AGAIN,
        )
    order = int(files.read_bytes(mark, 0, 1)[0]) if mark is not None and mark.bytes else 0
    if order:
        raise Refused(
            f"{tensor.path}: tensor {tensor.spec.name}_format is {order}: its rows are ordered for a kind of GPU",
            "save the base again with bitsandbytes 0.45 or later, which keeps the order of rows",
        )
    return Int8Weight(TensorSpec(tensor.spec.name, dtype, tensor.spec.shape), tensor, scales, (mark,) if mark else ())


def _four_bit(
    tensor: StoredTensor, parts: Mapping[str, StoredTensor], state: StoredTensor, files: SourceFiles
) -> FourBitWeight:
    name = tensor.spec.name
    try:
        facts = json.loads(files.read_bytes(state, 0, state.bytes).tobytes())
        shape, block = tuple(int(size) for size in facts["shape"]), int(facts["blocksize"])
        dtype, kind = FROM_TORCH_NAMES[facts["dtype"]], facts["quant_type"]
        offset = float(facts["nested_offset"]) if "nested_absmax" in parts else None
        if block not in BLOCK_SIZES or kind != state.spec.name.rpartition("__")[2] or min(shape) < 1:
            raise ValueError(f"{kind} of {list(shape)} in blocks of {block}")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{state.path}: tensor {state.spec.name} is no 4-bit state ({error})", SAVE_AGAIN) from None
    size = math.prod(shape)
    blocks = -(-size // block)
    needed = {"": (size + 1) // 2, "quant_map": 64, "absmax": blocks * (4 if offset is None else 1)}
    if offset is not None:
        needed |= {"nested_absmax": 4 * -(-blocks // double_quant.BLOCK), "nested_quant_map": 1024}
    for part, count in needed.items():
        found = tensor if not part else parts.get(part)
        if found is None or found.bytes != count:
            what = f"{name}.{part}".rstrip(".")
            have = "is missing" if found is None else f"has {found.bytes} bytes"
            raise InputError(
                f"{tensor.path}: tensor {what} {have}, a 4-bit weight of {list(shape)} needs {count}", SAVE_AGAIN
            )
    if facts.get("nested_blocksize", double_quant.BLOCK) != double_quant.BLOCK:
        raise InputError(
            f"{state.path}: tensor {state.spec.name} nests its absmax in blocks of {facts['nested_blocksize']}",
            f"bitsandbytes nests in blocks of {double_quant.BLOCK}",
        )
    spec = TensorSpec(name, dtype, shape)
    return FourBitWeight(spec, tensor, {**parts, STATE_MARK[1:] + kind: state}, kind, block, offset)


def _float8(tensor: StoredTensor, scales: StoredTensor, dtype: str, config: Mapping[str, Any]) -> Float8Weight:
    """The block size is stated in config.json, else it is what divides the matrix into the grid."""
    how = config.get("quantization_config") or {}
    if not isinstance(how, Mapping):
        raise InputError(f"config.json: quantization_config is {how!r}, expected a table", "restore config.json")
    stated = how.get("weight_block_size")
    if stated is not None and not (isinstance(stated, list) and all(type(step) is int for step in stated)):
        raise InputError(f"config.json: weight_block_size is {stated!r}, expected two numbers", "restore config.json")
    shape, grid = tensor.spec.shape, scales.spec.shape
    block = tuple(stated) if stated else tuple(size // max(count, 1) for size, count in zip(shape, grid, strict=False))
    fits = len(shape) == len(grid) == len(block) == 2 and all(
        step > 0 and -(-size // step) == count for size, step, count in zip(shape, block, grid, strict=True)
    )
    if not fits or scales.spec.dtype not in FLOATS:
        raise InputError(
            f"{tensor.path}: tensor {scales.spec.name} is {scales.spec.dtype} {list(grid)}, "
            f"{list(shape)} in blocks of {list(block)} needs another grid of 16 or 32-bit scales",
            SAVE_AGAIN,
        )
    return Float8Weight(TensorSpec(tensor.spec.name, dtype, shape), tensor, scales, (block[0], block[1]))
