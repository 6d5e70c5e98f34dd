"""Weights on an integer grid, as MatMulNBits takes them: packed ones as they are, dense ones rounded as they go by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qlora_export.errors import Refused
from qlora_export.exporters.onnx.graph import Raw
from qlora_export.exporters.onnx.options import BLOCK_SIZES
from qlora_export.quant import integers, packing
from qlora_export.quant.integers import Grid
from qlora_export.quant.packing import CODES_PER_WORD
from qlora_export.quant.scales import Int8
from qlora_export.tensors.dtypes import widen
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import Float32, TensorSpec


@dataclass(frozen=True)
class Blocks:
    """How a weight is cut: bits of a code, columns of a block, and whether blocks have zero points."""

    bits: int
    block: int
    zeros: bool


@dataclass(frozen=True)
class Layer(ABC):
    """A weight [out, in] on an integer grid, and how it is cut."""

    spec: TensorSpec
    blocks: Blocks

    @abstractmethod
    def codes(self, files: SourceFiles, first: int, count: int) -> Raw:
        """Packed codes of some rows."""

    @abstractmethod
    def scales(self, files: SourceFiles, first: int, count: int) -> Float32:
        """Scales of some rows, one for each block."""

    def zeros(self, files: SourceFiles, first: int, count: int) -> Int8:
        """Zero points [rows, blocks] of some rows; raises ValueError for a symmetric layer."""
        raise ValueError(f"{self.spec.name} is symmetric")


@dataclass(frozen=True)
class PackedLayer(Layer):
    """A layer as `w4a16` and `w8a16` store it."""

    packed: StoredTensor
    scale: StoredTensor
    zero: StoredTensor | None

    def codes(self, files: SourceFiles, first: int, count: int) -> Raw:
        """The words as they are."""
        return files.read(self.packed, first, count)

    def scales(self, files: SourceFiles, first: int, count: int) -> Float32:
        """Widened; that of a longer group is repeated for its blocks."""
        values = widen(files.read(self.scale, first, count), self.scale.spec.dtype)
        return np.repeat(values, self.spec.columns // self.blocks.block // self.scale.spec.columns)

    def zeros(self, files: SourceFiles, first: int, count: int) -> Int8:
        """Unpacked from the words that hold these rows."""
        if self.zero is None:
            return super().zeros(files, first, count)
        height = CODES_PER_WORD[self.blocks.bits]
        skipped = first % height
        words = files.read(self.zero, first // height, -(-(skipped + count) // height)).view(np.int32)
        words = words.reshape(-1, self.zero.spec.columns)
        values = packing.unpack_down(words, self.blocks.bits, skipped + count)[skipped:]
        return np.repeat(values, self.spec.columns // self.blocks.block // values.shape[1], axis=1)


@dataclass(frozen=True)
class RoundedLayer(Layer):
    """A dense weight, rounded to the nearest symmetric code of each block while it is written."""

    values: StoredTensor

    def codes(self, files: SourceFiles, first: int, count: int) -> Raw:
        """Rounded and packed."""
        values = self._values(files, first, count)
        scales, zeros = integers.fit(values, self._grid)
        codes = np.empty(values.shape, np.int8)
        integers.encode(values, scales, zeros, self._grid, codes)
        return packing.pack(codes, self.blocks.bits).reshape(-1).view(np.uint8)

    def scales(self, files: SourceFiles, first: int, count: int) -> Float32:
        """Half the range of a block over half the range of the codes."""
        return integers.fit(self._values(files, first, count), self._grid)[0].reshape(-1)

    @property
    def _grid(self) -> Grid:
        return Grid(self.blocks.bits, self.blocks.block, dtype="F32")

    def _values(self, files: SourceFiles, first: int, count: int) -> Float32:
        raw = files.read(self.values, first, count)
        return widen(raw, self.values.spec.dtype).reshape(count, self.spec.columns)


def packed_layer(module: str, tensors: Mapping[str, StoredTensor], dtype: str) -> PackedLayer:
    """A layer by its parts; raises Refused where MatMulNBits has no blocks like its groups."""
    name = f"{module}.weight"
    packed, scale = tensors[f"{name}_packed"], tensors[f"{name}_scale"]
    zero = tensors.get(f"{name}_zero_point")
    with SourceFiles() as files:
        shape = tensors[f"{name}_shape"]
        rows, columns = (int(length) for length in files.read_bytes(shape, 0, shape.bytes).view(np.int64))
    bits = 32 * packed.spec.columns // columns
    block = block_of(columns // scale.spec.columns, columns)
    if bits not in CODES_PER_WORD or bits * columns != 32 * packed.spec.columns or block is None:
        raise Refused(
            f"{name}: {columns} columns in {scale.spec.columns} groups of {bits} bits have no MatMulNBits of their own",
            f"its blocks have {', '.join(map(str, BLOCK_SIZES))} columns; keep the layer dense",
        )
    blocks = Blocks(bits, block, zero is not None)
    return PackedLayer(TensorSpec(name, dtype, (rows, columns)), blocks, packed, scale, zero)


def block_of(group: int, columns: int) -> int | None:
    """The longest block that a group is a multiple of."""
    return next((size for size in reversed(BLOCK_SIZES) if group % size == 0 and columns % size == 0), None)
