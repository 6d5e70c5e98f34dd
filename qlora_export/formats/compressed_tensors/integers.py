"""compressed-tensors integers: `w4a16`, `w8a16` (packed, 16-bit activations) and `w8a8` (8-bit activations, too).

For a linear `x.weight` of shape [out, in], scales in the model's dtype:
packed: `x.weight_packed` int32 [out, ceil(in * bits / 32)]; `x.weight_scale` [out, groups]; `x.weight_shape` int64 [2];
        with zero points `x.weight_zero_point` int32 [ceil(out / 8), groups], eight rows a word
plain: `x.weight` int8 [out, in]; `x.weight_scale` [out, 1].
`w4a16` has groups of 128 columns (option `group_size`: 32, 64 or 128), the others one scale a row. `w8a8` has its
activations rounded to int8 token by token while it runs. Grids are symmetric but for `w4a16` with `symmetric: false`.
Equations: `quant/integers.py`. Source: compressed-tensors `compressors/pack_quantized`, `naive_quantized`. Cost: 4.125
bits a weight for `w4a16`, 4.156 with zero points, 8 for the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_export.errors import UsageError
from qlora_export.formats.base import Chosen, LevelGrid
from qlora_export.formats.compressed_tensors.config import (
    INPUT_MAJOR,
    PER_CHANNEL,
    PER_TOKEN,
    arguments,
    rows_in,
    scale_dtype,
    table,
)
from qlora_export.quant import integers, packing
from qlora_export.quant.integers import Grid
from qlora_export.quant.mse_scales import search_groups
from qlora_export.quant.packing import CODES_PER_WORD, words
from qlora_export.quant.scales import Int8
from qlora_export.tensors.dtypes import ITEM_BYTES, narrow, widen
from qlora_export.types import Consumes, Float32, Part, Piece, Rounding, TensorSpec, TrainingQuantization

GROUP_SIZES = (32, 64, 128)
VISION = re.compile(r"(^|\.)(vision_tower|vision_model|visual)\.")
Raw = NDArray[np.uint8]


@dataclass(frozen=True)
class Integers:
    """Weights on an integer grid; `packed` into words, or with `activations` of as many bits."""

    name: str
    integers: Grid
    packed: bool = True
    activations: bool = False
    consumes: Consumes = "merged"
    quantises: bool = True
    keeps_adapter: bool = False
    beside_experts: bool = False
    searches: bool = False
    roundings: tuple[Rounding, ...] = ("search",)

    def rounded(self, rounding: Rounding, training: TrainingQuantization, seed: int) -> Integers:
        """With scales that a search finds."""
        return replace(self, searches=rounding == "search")

    @property
    def dense_dtype(self) -> str:
        """That of weights before they are coded, and of scales."""
        return self.integers.dtype

    def obstacle(self, spec: TensorSpec, input_major: bool) -> str | None:
        """Groups are whole, layers are `Linear`, and SigLIP initialises weights that packed layers do not have."""
        if self.integers.group and spec.columns % self.integers.group:
            return f"{spec.columns} columns are no multiple of the group of {self.integers.group}"
        if self.packed and VISION.search(spec.name):
            return "transformers does not load packed layers of a vision tower"
        return INPUT_MAJOR if input_major else None

    def row_multiple(self, spec: TensorSpec) -> int:
        """Any row stands alone, but for the zero points of a word."""
        return 1 if self.integers.symmetric else CODES_PER_WORD[self.integers.bits]

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """Codes, scales, zero points, and what unpacking needs."""
        groups = self.integers.groups(spec.columns)
        scales = Part(f"{spec.module}.weight_scale", self.integers.dtype, (spec.rows, groups))
        if not self.packed:
            return (Part(spec.name, "I8", spec.shape), scales)
        packed = Part(f"{spec.module}.weight_packed", "I32", (spec.rows, words(spec.columns, self.integers.bits)))
        shape = Part(f"{spec.module}.weight_shape", "I64", (2,))
        if self.integers.symmetric:
            return (packed, scales, shape)
        zeros = Part(f"{spec.module}.weight_zero_point", "I32", (words(spec.rows, self.integers.bits), groups))
        return (packed, scales, zeros, shape)

    def open(self, spec: TensorSpec) -> IntegerEncoder:
        """Start encoding a tensor."""
        return IntegerEncoder(spec, self)

    def decode(self, spec: TensorSpec, parts: Mapping[str, Raw], rows: range) -> Float32:
        """Flat float32 values of whole words of rows, before rounding to the dtype."""
        groups, item = self.integers.groups(spec.columns), ITEM_BYTES[self.integers.dtype]
        raw = _rows_of(parts[f"{spec.module}.weight_scale"], rows, groups * item)
        scales = widen(raw, self.integers.dtype).reshape(len(rows), groups)
        out = np.empty((len(rows), spec.columns), np.float32)
        integers.decode(self._codes(spec, parts, rows), scales, self._zeros(spec, parts, rows), out)
        return out.reshape(-1)

    def _zeros(self, spec: TensorSpec, parts: Mapping[str, Raw], rows: range) -> Int8:
        """Of some rows [rows, groups], whose words begin with the first."""
        groups, bits = self.integers.groups(spec.columns), self.integers.bits
        if self.integers.symmetric:
            return np.zeros((len(rows), groups), np.int8)
        height = CODES_PER_WORD[bits]
        words_of_rows = range(rows.start // height, -(-rows.stop // height))
        packed = _rows_of(parts[f"{spec.module}.weight_zero_point"], words_of_rows, 4 * groups).view(np.int32)
        return packing.unpack_down(packed.reshape(-1, groups), bits, len(rows))

    def _codes(self, spec: TensorSpec, parts: Mapping[str, Raw], rows: range) -> Int8:
        if not self.packed:
            return _rows_of(parts[spec.name], rows, spec.columns).view(np.int8).reshape(len(rows), -1)
        row_words = words(spec.columns, self.integers.bits)
        packed = _rows_of(parts[f"{spec.module}.weight_packed"], rows, 4 * row_words).view(np.int32)
        codes = np.empty((len(rows), spec.columns), np.int8)
        packing.unpack(packed.reshape(len(rows), row_words), self.integers.bits, codes)
        return codes

    def grid(self, spec: TensorSpec) -> LevelGrid | None:
        """All integers of so many bits; without groups, a row is one."""
        half = 1 << (self.integers.bits - 1)
        group = self.integers.group or spec.columns
        levels = tuple(float(level) for level in range(-half, half))
        return LevelGrid(levels, group, scale_dtype(self.integers.dtype))

    def assemble(self, spec: TensorSpec, chosen: Chosen) -> Iterable[Piece]:
        """Codes, scales and the shape."""
        half = 1 << (self.integers.bits - 1)
        codes = (chosen.codes.astype(np.int16) - half).astype(np.int8)
        encoder = IntegerEncoder(spec, self)
        yield from encoder.pieces(codes, chosen.scales, np.zeros(chosen.scales.shape, np.int8), 0)
        yield from encoder.seal()

    def chosen(self, spec: TensorSpec, parts: Mapping[str, Raw]) -> Chosen:
        """Numbers of levels and the scales."""
        half = 1 << (self.integers.bits - 1)
        codes = (self._codes(spec, parts, range(spec.rows)).astype(np.int16) + half).astype(np.uint8)
        scales = widen(np.array(parts[f"{spec.module}.weight_scale"]), self.integers.dtype)
        return Chosen(codes, scales.reshape(spec.rows, -1))

    def quantization_config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """The table of compressed-tensors."""
        bits = self.integers.bits
        grouped = {"group_size": self.integers.group, "strategy": "group", "dynamic": False}
        cut = grouped if self.integers.group else PER_CHANNEL
        weights = arguments(bits, "int", self.integers.symmetric, cut)
        activations = arguments(bits, "int", True, PER_TOKEN) if self.activations else None
        return table("pack-quantized" if self.packed else "int-quantized", weights, activations, kept)


@dataclass(frozen=True)
class IntegerEncoder:
    """Codes rows; keeps no state."""

    spec: TensorSpec
    layout: Integers

    def encode(self, values: Float32, first_row: int) -> Iterable[Piece]:
        """Codes and scales of some rows at their places."""
        grid = self.layout.integers
        rows = rows_in(values, self.spec, grid.dtype)
        scales, zeros = integers.fit(rows, grid)
        if self.layout.searches:
            scales = search_groups(rows, scales, zeros, grid)
        codes = np.empty(rows.shape, np.int8)
        integers.encode(rows, scales, zeros, grid, codes)
        yield from self.pieces(codes, scales, zeros, first_row)

    def pieces(self, codes: Int8, scales: Float32, zeros: Int8, first_row: int) -> Iterable[Piece]:
        """Rows of codes, scales and zero points at their places."""
        grid, module = self.layout.integers, self.spec.module
        if not grid.symmetric:
            place = first_row // CODES_PER_WORD[grid.bits] * zeros.shape[1] * 4
            yield Piece(f"{module}.weight_zero_point", place, _bytes_of(packing.pack_down(zeros, grid.bits)))
        raw = narrow(scales.reshape(-1), grid.dtype)
        yield Piece(f"{module}.weight_scale", first_row * scales.shape[1] * ITEM_BYTES[grid.dtype], raw)
        if not self.layout.packed:
            yield Piece(self.spec.name, first_row * self.spec.columns, _bytes_of(codes))
            return
        packed = np.empty((len(codes), words(self.spec.columns, grid.bits)), np.int32)
        packing.pack(codes, grid.bits, packed)
        yield Piece(f"{module}.weight_packed", first_row * packed.shape[1] * 4, _bytes_of(packed))

    def seal(self) -> Iterable[Piece]:
        """The shape, which packed words do not tell."""
        if self.layout.packed:
            yield Piece(f"{self.spec.module}.weight_shape", 0, _bytes_of(np.array(self.spec.shape, np.int64)))


def _rows_of(raw: Raw, rows: range, row_bytes: int) -> Raw:
    """The bytes of some rows, aligned."""
    return np.array(raw[rows.start * row_bytes : rows.stop * row_bytes])


def _bytes_of(values: NDArray[Any]) -> Raw:
    return values.reshape(-1).view(np.uint8)


def w4a16(training: TrainingQuantization, *, group_size: int = 128, symmetric: bool = True) -> Integers:
    """Merged weights in 4 bits, packed, with zero points unless symmetric; raises UsageError for other options."""
    if group_size not in GROUP_SIZES:
        raise UsageError(f"w4a16: group_size {group_size!r}; known: {', '.join(str(size) for size in GROUP_SIZES)}")
    if not isinstance(symmetric, bool):
        raise UsageError(f"w4a16: symmetric {symmetric!r}; known: true, false")
    return Integers("w4a16", Grid(4, group_size, symmetric, training.storage_dtype))


def w8a16(training: TrainingQuantization) -> Integers:
    """Merged weights in 8 bits, packed, one scale a row."""
    return Integers("w8a16", Grid(8, None, dtype=training.storage_dtype))


def w8a8(training: TrainingQuantization) -> Integers:
    """Merged weights in 8 bits, one scale a row; activations in 8 bits, one scale a token."""
    return Integers("w8a8", Grid(8, None, dtype=training.storage_dtype), packed=False, activations=True)
