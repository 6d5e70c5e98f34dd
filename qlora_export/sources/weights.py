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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from qlora_export.errors import InputError
from qlora_export.quant import double_quant, float8, four_bit
from qlora_export.quant.floats import Float32, UInt8
from qlora_export.tensors.dtypes import widen
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import StoredScales, TensorSpec

Storage = Literal["plain", "nf4", "fp4", "int8", "fp8"]


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
        return four_bit.rows_of_whole_blocks(self.spec.columns, self.block)

    def rows(self, files: SourceFiles, first: int, count: int) -> Float32:
        """codebook[code] * absmax."""
        out = np.empty(count * self.spec.columns, np.float32)
        start = first * self.spec.columns
        codes = files.read_bytes(self.codes, start // 2, (out.size + 1) // 2)
        blocks = range(start // self.block, start // self.block - (-out.size // self.block))
        codebook = files.read_bytes(self.parts["quant_map"], 0, 64).view(np.float32)
        four_bit.decode(codes, self._scales(files, blocks), self.block, codebook, out)
        return out

    def packed(self, files: SourceFiles, first: int, count: int) -> UInt8:
        """The packed codes of some rows."""
        start, size = first * self.spec.columns, count * self.spec.columns
        return files.read_bytes(self.codes, start // 2, (size + 1) // 2)

    def scales(self, files: SourceFiles) -> StoredScales:
        """The whole absmax state; raises InputError where its maps are not those that this version writes."""
        maps = {"quant_map": four_bit.GRIDS[self.storage].codebook}
        maps |= {} if self.offset is None else {"nested_quant_map": double_quant.dynamic_map()}
        for name, expected in maps.items():
            if files.read_bytes(self.parts[name], 0, 4 * expected.size).tobytes() != expected.tobytes():
                raise InputError(
                    f"{self.codes.path}: tensor {self.spec.name}.{name} is not bitsandbytes' own map",
                    "round to nearest instead: `rounding: nearest`",
                )
        blocks = range(-(-self.spec.size // self.block))
        scales = self._scales(files, blocks)
        if self.offset is None:
            return StoredScales(scales)
        codes = files.read_bytes(self.parts["absmax"], 0, len(blocks))
        nested_absmax = files.read_bytes(self.parts["nested_absmax"], 0, self.parts["nested_absmax"].bytes)
        return StoredScales(scales, codes, nested_absmax.view(np.float32), self.offset)

    def _scales(self, files: SourceFiles, blocks: range) -> Float32:
        if self.offset is None:
            return files.read_bytes(self.parts["absmax"], 4 * blocks.start, 4 * len(blocks)).view(np.float32)
        codes = files.read_bytes(self.parts["absmax"], blocks.start, len(blocks))
        first, last = blocks.start // double_quant.BLOCK, (blocks.stop - 1) // double_quant.BLOCK
        absmax = files.read_bytes(self.parts["nested_absmax"], 4 * first, 4 * (last + 1 - first)).view(np.float32)
        codebook = files.read_bytes(self.parts["nested_quant_map"], 0, 1024).view(np.float32)
        within = blocks.start - first * double_quant.BLOCK
        return double_quant.decode(codes, absmax, np.float32(self.offset), within, codebook)


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
