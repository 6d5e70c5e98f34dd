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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_export.errors import UsageError
from qlora_export.formats.base import Chosen, GridFormat, LevelGrid, RowEncoder, Stored
from qlora_export.formats.compressed_tensors.config import (
    INPUT_MAJOR,
    PER_CHANNEL,
    PER_TOKEN,
    WIDER_DTYPE,
    arguments,
    scale_dtype,
    table,
)
from qlora_export.formats.rows import GROUP_SIZES, require_choice, row_piece, rows_in, stored_rows
from qlora_export.quant import integers, packing
from qlora_export.quant.integers import Grid
from qlora_export.quant.mse_scales import search_groups
from qlora_export.quant.packing import CODES_PER_WORD, words
from qlora_export.quant.scales import Int8
from qlora_export.types import Float32, Part, Piece, TensorSpec, TrainingQuantization

VISION = re.compile(r"(^|\.)(vision_tower|vision_model|visual)\.")


@dataclass(frozen=True, kw_only=True)
class Integers(GridFormat):
    """Weights on an integer grid; `packed` into words, or with `activations` of as many bits."""

    integers: Grid
    packed: bool = True
    activations: bool = False
    beside_experts: bool = False

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
        zeros, shape = self._zero_part(spec), Part(f"{spec.module}.weight_shape", "I64", (2,))
        first = (self._code_part(spec), self._scale_part(spec))
        return (*first, *(() if self.integers.symmetric else (zeros,)), *((shape,) if self.packed else ()))

    def _code_part(self, spec: TensorSpec) -> Part:
        if not self.packed:
            return Part(spec.name, "I8", spec.shape)
        return Part(f"{spec.module}.weight_packed", "I32", (spec.rows, words(spec.columns, self.integers.bits)))

    def _scale_part(self, spec: TensorSpec) -> Part:
        return Part(f"{spec.module}.weight_scale", self.dense_dtype, (spec.rows, self.integers.groups(spec.columns)))

    def _zero_part(self, spec: TensorSpec) -> Part:
        shape = (words(spec.rows, self.integers.bits), self.integers.groups(spec.columns))
        return Part(f"{spec.module}.weight_zero_point", "I32", shape)

    def open(self, spec: TensorSpec) -> RowEncoder:
        """Start encoding a tensor."""
        return RowEncoder(self._encode, spec, self._known(spec))

    def _encode(self, spec: TensorSpec, values: Float32, first_row: int) -> Iterable[Piece]:
        grid = self.integers
        rows = rows_in(values, spec, grid.dtype, WIDER_DTYPE)
        scales, zeros = integers.fit(rows, grid)
        if self.searches:
            scales = search_groups(rows, scales, zeros, grid)
        codes = np.empty(rows.shape, np.int8)
        integers.encode(rows, scales, zeros, grid, codes)
        yield from self._pieces(spec, codes, scales, first_row)
        if not grid.symmetric:
            first_word = first_row // CODES_PER_WORD[grid.bits]
            yield row_piece(self._zero_part(spec), packing.pack_down(zeros, grid.bits), first_word)

    def _pieces(self, spec: TensorSpec, codes: Int8, scales: Float32, first_row: int) -> Iterable[Piece]:
        """Rows of codes and scales at their places."""
        stored = packing.pack(codes, self.integers.bits) if self.packed else codes
        return row_piece(self._code_part(spec), stored, first_row), row_piece(self._scale_part(spec), scales, first_row)

    def _known(self, spec: TensorSpec) -> tuple[Piece, ...]:
        """The shape, which packed words do not tell."""
        shape = np.array(spec.shape, np.int64)
        return (row_piece(self.parts(spec)[-1], shape, 0),) if self.packed else ()

    def decode(self, spec: TensorSpec, parts: Stored, rows: range) -> Float32:
        """Flat float32 values of whole words of rows, before rounding to the dtype."""
        scales = stored_rows(parts, self._scale_part(spec), rows)
        out = np.empty((len(rows), spec.columns), np.float32)
        integers.decode(self._codes(spec, parts, rows), scales, self._zeros(spec, parts, rows), out)
        return out.reshape(-1)

    def _zeros(self, spec: TensorSpec, parts: Stored, rows: range) -> Int8:
        """Of some rows [rows, groups], whose words begin with the first."""
        bits = self.integers.bits
        if self.integers.symmetric:
            return np.zeros((len(rows), self.integers.groups(spec.columns)), np.int8)
        places = range(rows.start // CODES_PER_WORD[bits], words(rows.stop, bits))
        return packing.unpack_down(stored_rows(parts, self._zero_part(spec), places), bits, len(rows))

    def _codes(self, spec: TensorSpec, parts: Stored, rows: range) -> Int8:
        stored = stored_rows(parts, self._code_part(spec), rows)
        codes: Int8 = packing.unpack(stored, self.integers.bits, spec.columns) if self.packed else stored
        return codes

    def grid(self, spec: TensorSpec) -> LevelGrid | None:
        """All integers of so many bits; without groups, a row is one."""
        group, dtype = self.integers.group or spec.columns, scale_dtype(self.dense_dtype)
        return LevelGrid(self.integers.levels, group, dtype)

    def assemble(self, spec: TensorSpec, chosen: Chosen) -> Iterable[Piece]:
        """Codes, scales, zero points of zero and the shape."""
        yield from self._pieces(spec, self.integers.codes(chosen.codes), chosen.scales, 0)
        if not self.integers.symmetric:
            zeros = np.zeros(chosen.scales.shape, np.int8)
            yield row_piece(self._zero_part(spec), packing.pack_down(zeros, self.integers.bits), 0)
        yield from self._known(spec)

    def chosen(self, spec: TensorSpec, parts: Stored) -> Chosen:
        """Numbers of levels and the scales."""
        rows = range(spec.rows)
        codes = self.integers.numbers(self._codes(spec, parts, rows))
        return Chosen(codes, stored_rows(parts, self._scale_part(spec), rows))

    def quantization_config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """The table of compressed-tensors."""
        bits = self.integers.bits
        grouped = {"group_size": self.integers.group, "strategy": "group", "dynamic": False}
        cut = grouped if self.integers.group else PER_CHANNEL
        weights = arguments(bits, "int", self.integers.symmetric, cut)
        activations = arguments(bits, "int", True, PER_TOKEN) if self.activations else None
        return table("pack-quantized" if self.packed else "int-quantized", weights, activations, kept)


def w4a16(training: TrainingQuantization, *, group_size: int = 128, symmetric: bool = True) -> Integers:
    """Merged weights in 4 bits, packed, with zero points unless symmetric; raises UsageError for other options."""
    require_choice("w4a16", "group_size", group_size, GROUP_SIZES)
    if not isinstance(symmetric, bool):
        raise UsageError(f"w4a16: symmetric {symmetric!r}; known: true, false")
    return _integers("w4a16", Grid(4, group_size, symmetric, training.storage_dtype))


def w8a16(training: TrainingQuantization) -> Integers:
    """Merged weights in 8 bits, packed, one scale a row."""
    return _integers("w8a16", Grid(8, None, dtype=training.storage_dtype))


def w8a8(training: TrainingQuantization) -> Integers:
    """Merged weights in 8 bits, one scale a row; activations in 8 bits, one scale a token."""
    return _integers("w8a8", Grid(8, None, dtype=training.storage_dtype), packed=False, activations=True)


def _integers(name: str, grid: Grid, packed: bool = True, activations: bool = False) -> Integers:
    return Integers(name=name, dense_dtype=grid.dtype, integers=grid, packed=packed, activations=activations)
