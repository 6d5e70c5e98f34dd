"""compressed-tensors FP8 in blocks: `fp8-block`, float8_e4m3, one scale for 128 x 128 weights and for 128 activations.

For a linear `x.weight` of shape [out, in]: `x.weight` float8_e4m3fn [out, in]; `x.weight_scale` [ceil(out / 128),
in / 128] in the model's dtype; the last block of rows may be short, as the library pads it with zeros. Equations:
`quant/float8.py`. Activations are rounded to FP8 in groups of 128 while it runs. Source: compressed-tensors preset
FP8_BLOCK, `compressors/naive_quantized`. Cost: 8 bits a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_export.formats.base import Chosen, LevelGrid
from qlora_export.formats.compressed_tensors.config import (
    INPUT_MAJOR,
    arguments,
    rows_in,
    scale_dtype,
    scales_in,
    table,
)
from qlora_export.quant import float8, ordered_codes
from qlora_export.quant.floats import UInt8
from qlora_export.quant.mse_float_scales import E4M3, search_float_groups
from qlora_export.quant.scales import absmax, symmetric
from qlora_export.tensors.dtypes import ITEM_BYTES, narrow, widen
from qlora_export.types import Consumes, Float32, Part, Piece, Rounding, TensorSpec, TrainingQuantization

BLOCK = 128


@dataclass(frozen=True)
class Float8Blocks:
    """Weights in float8_e4m3; dense tensors and scales have the dtype that the base was loaded in."""

    dense_dtype: str
    name: str = "fp8-block"
    consumes: Consumes = "merged"
    quantises: bool = True
    keeps_adapter: bool = False
    beside_experts: bool = True
    searches: bool = False
    roundings: tuple[Rounding, ...] = ("search",)

    def rounded(self, rounding: Rounding, training: TrainingQuantization, seed: int) -> Float8Blocks:
        """With scales that a search finds."""
        return replace(self, searches=rounding == "search")

    def obstacle(self, spec: TensorSpec, input_major: bool) -> str | None:
        """Activations come in whole groups, layers are `Linear`."""
        if spec.columns % BLOCK:
            return f"{spec.columns} columns are no multiple of the block of {BLOCK}"
        return INPUT_MAJOR if input_major else None

    def row_multiple(self, spec: TensorSpec) -> int:
        """The height of a block."""
        return BLOCK

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """Codes and scales."""
        shape = (-(-spec.rows // BLOCK), spec.columns // BLOCK)
        return (
            Part(spec.name, "F8_E4M3", spec.shape),
            Part(f"{spec.module}.weight_scale", self.dense_dtype, shape),
        )

    def open(self, spec: TensorSpec) -> Float8BlocksEncoder:
        """Start encoding a tensor."""
        return Float8BlocksEncoder(spec, self.dense_dtype, self.searches)

    def decode(self, spec: TensorSpec, parts: Mapping[str, NDArray[np.uint8]], rows: range) -> Float32:
        """Flat float32 values of some rows, before rounding to the dtype."""
        groups = spec.columns // BLOCK
        scales = widen(np.array(parts[f"{spec.module}.weight_scale"]), self.dense_dtype).reshape(-1, groups)
        codes = parts[spec.name][rows.start * spec.columns : rows.stop * spec.columns]
        out = np.empty((len(rows), spec.columns), np.float32)
        float8.decode_e4m3(codes.reshape(out.shape), scales[np.arange(rows.start, rows.stop) // BLOCK], out)
        return out.reshape(-1)

    def grid(self, spec: TensorSpec) -> LevelGrid | None:
        """All finite values of e4m3; rows share scales, too."""
        return LevelGrid(ordered_codes.E4M3.levels, BLOCK, scale_dtype(self.dense_dtype), BLOCK)

    def assemble(self, spec: TensorSpec, chosen: Chosen) -> Iterable[Piece]:
        """Codes and scales."""
        encoder = Float8BlocksEncoder(spec, self.dense_dtype)
        return encoder.pieces(ordered_codes.E4M3.codes[chosen.codes], chosen.scales, 0)

    def chosen(self, spec: TensorSpec, parts: Mapping[str, NDArray[np.uint8]]) -> Chosen:
        """Numbers of levels, of either zero the same, and the scales."""
        scales = widen(np.array(parts[f"{spec.module}.weight_scale"]), self.dense_dtype)
        numbers = ordered_codes.E4M3.numbers[parts[spec.name]]
        return Chosen(numbers.reshape(spec.shape), scales.reshape(-1, spec.columns // BLOCK))

    def quantization_config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """The table of compressed-tensors."""
        block = {"group_size": None, "strategy": "block", "block_structure": [BLOCK, BLOCK], "dynamic": False}
        group = {"group_size": BLOCK, "strategy": "group", "dynamic": True}
        weights, activations = arguments(8, "float", True, block), arguments(8, "float", True, group)
        return table("float-quantized", weights, activations, kept)


@dataclass(frozen=True)
class Float8BlocksEncoder:
    """Codes blocks of rows; keeps no state."""

    spec: TensorSpec
    dtype: str
    searches: bool = False

    def encode(self, values: Float32, first_row: int) -> Iterable[Piece]:
        """Codes and scales of some rows at their places."""
        rows = rows_in(values, self.spec, self.dtype)
        largest = np.empty((len(rows), self.spec.columns // BLOCK), np.float32)
        absmax(rows, largest)
        of_blocks = np.maximum.reduceat(largest, np.arange(0, len(rows), BLOCK), axis=0)
        scales = symmetric(of_blocks, float8.LARGEST, self.dtype)
        codes, dtype = np.empty(rows.shape, np.uint8), self.dtype
        if self.searches:
            scales, dtype = search_float_groups(rows, scales, E4M3, scales_in(self.dtype), BLOCK), "F32"
        float8.encode_e4m3(rows, scales[np.arange(len(rows)) // BLOCK], dtype, codes)
        yield from self.pieces(codes, scales, first_row)

    def pieces(self, codes: UInt8, scales: Float32, first_row: int) -> Iterable[Piece]:
        """Blocks of rows of codes, and their scales, at their places."""
        yield Piece(self.spec.name, first_row * self.spec.columns, codes.reshape(-1))
        place = first_row // BLOCK * scales.shape[1] * ITEM_BYTES[self.dtype]
        yield Piece(f"{self.spec.module}.weight_scale", place, narrow(scales.reshape(-1), self.dtype))

    def seal(self) -> Iterable[Piece]:
        """Nothing is left to write."""
        return ()


def fp8_block(training: TrainingQuantization) -> Float8Blocks:
    """Merged weights in FP8 by blocks."""
    return Float8Blocks(training.storage_dtype)
