"""compressed-tensors FP8: `fp8` with one scale a row, `fp8-block` with one for 128 x 128 weights, in float8_e4m3.

For a linear `x.weight` of shape [out, in]: `x.weight` float8_e4m3fn [out, in]; `x.weight_scale` [out, 1], or
[ceil(out / 128), in / 128], in the model's dtype; the last block of rows may be short, as the library pads it with
zeros. Equations: `quant/float8.py`. Activations are rounded to FP8 while it runs: token by token, or in groups of 128.
vLLM calls the first FP8_DYNAMIC; it multiplies in FP8 on GPUs from compute capability 8.9 on. Source:
compressed-tensors `compressors/naive_quantized`, preset FP8_BLOCK. Cost: 8 bits a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_export.formats.base import Chosen, GridFormat, LevelGrid, RowEncoder, Stored
from qlora_export.formats.compressed_tensors.config import (
    INPUT_MAJOR,
    PER_CHANNEL,
    PER_TOKEN,
    WIDER_DTYPE,
    arguments,
    scale_dtype,
    scales_in,
    table,
)
from qlora_export.formats.rows import row_piece, rows_in, stored_rows
from qlora_export.quant import float8
from qlora_export.quant.floats import UInt8
from qlora_export.quant.mse_float_scales import E4M3, search_float_groups
from qlora_export.quant.ordered_codes import E4M3 as ORDER
from qlora_export.types import Float32, Part, Piece, TensorSpec, TrainingQuantization


@dataclass(frozen=True, kw_only=True)
class Float8(GridFormat):
    """Weights in float8_e4m3, a scale for each row or for each square `block`; scales are of the model's dtype."""

    block: int | None = None

    @property
    def _height(self) -> int:
        return self.block or 1

    def obstacle(self, spec: TensorSpec, input_major: bool) -> str | None:
        """Activations come in whole groups, layers are `Linear`."""
        if self.block and spec.columns % self.block:
            return f"{spec.columns} columns are no multiple of the block of {self.block}"
        return INPUT_MAJOR if input_major else None

    def row_multiple(self, spec: TensorSpec) -> int:
        """The height of a block."""
        return self._height

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """Codes and scales."""
        shape = (-(-spec.rows // self._height), spec.columns // (self.block or spec.columns))
        return Part(spec.name, "F8_E4M3", spec.shape), Part(f"{spec.module}.weight_scale", self.dense_dtype, shape)

    def open(self, spec: TensorSpec) -> RowEncoder:
        """Start encoding a tensor."""
        return RowEncoder(self._encode, spec)

    def _encode(self, spec: TensorSpec, values: Float32, first_row: int) -> Iterable[Piece]:
        rows = rows_in(values, spec, self.dense_dtype, WIDER_DTYPE)
        height, groups = self._height, self.parts(spec)[1].shape[1]
        scales = float8.fit_e4m3(rows, self.dense_dtype, groups, height)
        codes, dtype = np.empty(rows.shape, np.uint8), self.dense_dtype
        if self.searches:
            scales, dtype = search_float_groups(rows, scales, E4M3, scales_in(dtype), height), "F32"
        float8.encode_e4m3(rows, scales[np.arange(len(rows)) // height], dtype, codes)
        return self._pieces(spec, codes, scales, first_row)

    def _pieces(self, spec: TensorSpec, codes: UInt8, scales: Float32, first_row: int) -> Iterable[Piece]:
        of_codes, of_scales = self.parts(spec)
        return row_piece(of_codes, codes, first_row), row_piece(of_scales, scales, first_row // self._height)

    def decode(self, spec: TensorSpec, parts: Stored, rows: range) -> Float32:
        """Flat float32 values of some rows, before rounding to the dtype."""
        of_codes, of_scales = self.parts(spec)
        blocks = range(rows.start // self._height, -(-rows.stop // self._height))
        scales = stored_rows(parts, of_scales, blocks)
        out = np.empty((len(rows), spec.columns), np.float32)
        places = np.arange(rows.start, rows.stop) // self._height - blocks.start
        float8.decode_e4m3(stored_rows(parts, of_codes, rows), scales[places], out)
        return out.reshape(-1)

    def grid(self, spec: TensorSpec) -> LevelGrid | None:
        """All finite values of e4m3; rows of a block share scales."""
        return LevelGrid(ORDER.levels, self.block or spec.columns, scale_dtype(self.dense_dtype), self._height)

    def assemble(self, spec: TensorSpec, chosen: Chosen) -> Iterable[Piece]:
        """Codes and scales."""
        return self._pieces(spec, ORDER.codes[chosen.codes], chosen.scales, 0)

    def chosen(self, spec: TensorSpec, parts: Stored) -> Chosen:
        """Numbers of levels, of either zero the same, and the scales."""
        of_codes, of_scales = self.parts(spec)
        scales = stored_rows(parts, of_scales, range(of_scales.shape[0]))
        return Chosen(ORDER.numbers[parts[of_codes.name]].reshape(spec.shape), scales)

    def quantization_config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """The table of compressed-tensors."""
        block: dict[str, Any] = {"block_structure": [self.block, self.block], "dynamic": False}
        group: dict[str, Any] = {"group_size": self.block, "strategy": "group", "dynamic": True}
        cut = {"group_size": None, "strategy": "block", **block} if self.block else PER_CHANNEL
        weights = arguments(8, "float", True, cut)
        return table("float-quantized", weights, arguments(8, "float", True, group if self.block else PER_TOKEN), kept)


def fp8(training: TrainingQuantization) -> Float8:
    """Merged weights in FP8."""
    return Float8(name="fp8", dense_dtype=training.storage_dtype)
