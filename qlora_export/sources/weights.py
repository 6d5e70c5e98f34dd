"""How the weights of a base are stored, and their float32 values, row block by row block.

    plain        16 or 32-bit floats, as they are
    4-bit        bitsandbytes nf4 or fp4: codebook[code] * absmax, absmax float32 or nested 8-bit; the file's own maps
    8-bit        bitsandbytes int8: code * SCB[row] / 127
    FP8          float8_e4m3 in square blocks: code * weight_scale_inv[block]

What belongs to a weight (absmax, maps, SCB, scales) is found by its name and is no tensor of its own. Sources:
bitsandbytes `QuantState.from_dict` and `int8_vectorwise_dequant`, transformers `Fp8Dequantize`.
Cost: one read of the codes; the scales of a row block are read with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from qlora_export.contracts import BLOCK_SIZES, FROM_TORCH_NAMES, TensorSpec
from qlora_export.errors import InputError, Refused
from qlora_export.quant import float8, nested, nf4
from qlora_export.quant.floats import Float32
from qlora_export.tensors.dtypes import FLOATS, widen
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.reading import SourceFiles

Storage = Literal["plain", "nf4", "fp4", "int8", "fp8"]
STATE_MARK = ".quant_state.bitsandbytes__"
FOUR_BIT_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
SAVE_AGAIN = "save the base again with the library that quantised it"


class Weight(Protocol):
    """One tensor of a model: `spec` has the dtype and shape of its values, `stored` is everything on disk."""

    @property
    def spec(self) -> TensorSpec:
        """Name, dtype of the values, shape."""
        ...

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The tensors of the file that belong to it, its own first."""
        ...

    @property
    def storage(self) -> Storage:
        """How it is stored."""
        ...

    @property
    def row_multiple(self) -> int:
        """Fewest rows that can be decoded alone."""
        ...

    def rows(self, files: SourceFiles, first: int, count: int) -> Float32:
        """Flat float32 values of some rows, before any rounding."""
        ...


def weight_bytes(weight: Weight) -> int:
    """What the weight takes on disk."""
    return sum(tensor.bytes for tensor in weight.stored)


@dataclass(frozen=True)
class PlainWeight:
    """Floats as they are; other dtypes can only be copied."""

    tensor: StoredTensor
    storage: Storage = "plain"
    row_multiple: int = 1

    @property
    def spec(self) -> TensorSpec:
        """That of the stored tensor."""
        return self.tensor.spec

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The tensor alone."""
        return (self.tensor,)

    def rows(self, files: SourceFiles, first: int, count: int) -> Float32:
        """The values, widened."""
        return widen(files.read(self.tensor, first, count), self.spec.dtype)


@dataclass(frozen=True)
class FourBitWeight:
    """bitsandbytes 4-bit codes with their absmax; `offset` is the mean of a nested absmax."""

    spec: TensorSpec
    codes: StoredTensor
    parts: Mapping[str, StoredTensor]
    storage: Storage
    block: int
    offset: float | None

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Codes, absmax, maps, state."""
        return (self.codes, *self.parts.values())

    @property
    def row_multiple(self) -> int:
        """Rows of whole blocks; whole bytes follow."""
        return nf4.rows_of_whole_blocks(self.spec.columns, self.block)

    def rows(self, files: SourceFiles, first: int, count: int) -> Float32:
        """codebook[code] * absmax."""
        out = np.empty(count * self.spec.columns, np.float32)
        start = first * self.spec.columns
        codes = files.read_bytes(self.codes, start // 2, (out.size + 1) // 2)
        blocks = range(start // self.block, start // self.block - (-out.size // self.block))
        codebook = files.read_bytes(self.parts["quant_map"], 0, 64).view(np.float32)
        nf4.decode(codes, self._scales(files, blocks), self.block, codebook, out)
        return out

    def _scales(self, files: SourceFiles, blocks: range) -> Float32:
        if self.offset is None:
            return files.read_bytes(self.parts["absmax"], 4 * blocks.start, 4 * len(blocks)).view(np.float32)
        codes = files.read_bytes(self.parts["absmax"], blocks.start, len(blocks))
        first, last = blocks.start // nested.BLOCK, (blocks.stop - 1) // nested.BLOCK
        absmax = files.read_bytes(self.parts["nested_absmax"], 4 * first, 4 * (last + 1 - first)).view(np.float32)
        codebook = files.read_bytes(self.parts["nested_quant_map"], 0, 1024).view(np.float32)
        within = blocks.start - first * nested.BLOCK
        return nested.decode(codes, absmax, np.float32(self.offset), within, codebook)


@dataclass(frozen=True)
class Int8Weight:
    """bitsandbytes int8 rows with one scale each."""

    spec: TensorSpec
    codes: StoredTensor
    scales: StoredTensor
    others: tuple[StoredTensor, ...] = ()
    storage: Storage = "int8"
    row_multiple: int = 1

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Codes, SCB, and the mark of their order."""
        return (self.codes, self.scales, *self.others)

    def rows(self, files: SourceFiles, first: int, count: int) -> Float32:
        """Code * SCB * (1 / 127), in the order of bitsandbytes."""
        codes = files.read(self.codes, first, count).view(np.int8).reshape(count, -1)
        scales = widen(files.read(self.scales, first, count), self.scales.spec.dtype)
        values: Float32 = codes.astype(np.float32) * scales[:, None] * np.float32(7.874015718698502e-3)
        return values.reshape(-1)


@dataclass(frozen=True)
class Float8Weight:
    """float8_e4m3 in blocks that the grid of scales divides the matrix into."""

    spec: TensorSpec
    codes: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]
    storage: Storage = "fp8"
    row_multiple: int = 1

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Codes and scales."""
        return (self.codes, self.scales)

    def rows(self, files: SourceFiles, first: int, count: int) -> Float32:
        """Code * scale of its block."""
        raw = files.read(self.codes, first, count)
        values = float8.widen_e4m3(raw).reshape(count, -1)
        rows, columns = self.block
        scales = files.values(self.scales).reshape(self.scales.spec.rows, -1)
        per_row = np.repeat(scales[np.arange(first, first + count) // rows], columns, axis=1)
        scaled: Float32 = values * per_row[:, : values.shape[1]]
        return scaled.reshape(-1)


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
        needed |= {"nested_absmax": 4 * -(-blocks // nested.BLOCK), "nested_quant_map": 1024}
    for part, count in needed.items():
        found = tensor if not part else parts.get(part)
        if found is None or found.bytes != count:
            what = f"{name}.{part}".rstrip(".")
            have = "is missing" if found is None else f"has {found.bytes} bytes"
            raise InputError(
                f"{tensor.path}: tensor {what} {have}, a 4-bit weight of {list(shape)} needs {count}", SAVE_AGAIN
            )
    if facts.get("nested_blocksize", nested.BLOCK) != nested.BLOCK:
        raise InputError(
            f"{state.path}: tensor {state.spec.name} nests its absmax in blocks of {facts['nested_blocksize']}",
            f"bitsandbytes nests in blocks of {nested.BLOCK}",
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
