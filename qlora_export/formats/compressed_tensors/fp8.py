"""compressed-tensors FP8: `fp8`, merged weights in float8_e4m3 with one scale a row, activations in FP8 token by token.

For a linear `x.weight` of shape [out, in]: `x.weight` float8_e4m3fn [out, in]; `x.weight_scale` [out, 1] in the model's
dtype. Equations: `quant/float8.py`. vLLM calls it FP8_DYNAMIC; it multiplies in FP8 on GPUs from compute capability 8.9
on. Source: compressed-tensors `compressors/naive_quantized`. Cost: 8 bits a weight.
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
    PER_CHANNEL,
    PER_TOKEN,
    arguments,
    rows_in,
    scale_dtype,
    scales_in,
    table,
)
from qlora_export.quant import float8, ordered_codes
from qlora_export.quant.floats import UInt8
from qlora_export.quant.mse_float_scales import E4M3, search_float_groups
from qlora_export.tensors.dtypes import ITEM_BYTES, narrow, widen
from qlora_export.types import Consumes, Float32, Part, Piece, Rounding, TensorSpec, TrainingQuantization


@dataclass(frozen=True)
class Float8:
    """Weights in float8_e4m3; dense tensors and scales have the dtype that the base was loaded in."""

    dense_dtype: str
    name: str = "fp8"
    consumes: Consumes = "merged"
    quantises: bool = True
    keeps_adapter: bool = False
    beside_experts: bool = True
    searches: bool = False
    roundings: tuple[Rounding, ...] = ("search",)

    def rounded(self, rounding: Rounding, training: TrainingQuantization, seed: int) -> Float8:
        """With scales that a search finds."""
        return replace(self, searches=rounding == "search")

    def obstacle(self, spec: TensorSpec, input_major: bool) -> str | None:
        """Layers are `Linear`."""
        return INPUT_MAJOR if input_major else None

    def row_multiple(self, spec: TensorSpec) -> int:
        """Any row stands alone."""
        return 1

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """Codes and scales."""
        return (
            Part(spec.name, "F8_E4M3", spec.shape),
            Part(f"{spec.module}.weight_scale", self.dense_dtype, (spec.rows, 1)),
        )

    def open(self, spec: TensorSpec) -> Float8Encoder:
        """Start encoding a tensor."""
        return Float8Encoder(spec, self.dense_dtype, self.searches)

    def decode(self, spec: TensorSpec, parts: Mapping[str, NDArray[np.uint8]], rows: range) -> Float32:
        """Flat float32 values of some rows, before rounding to the dtype."""
        item = ITEM_BYTES[self.dense_dtype]
        raw = np.array(parts[f"{spec.module}.weight_scale"][rows.start * item : rows.stop * item])
        codes = parts[spec.name][rows.start * spec.columns : rows.stop * spec.columns]
        out = np.empty((len(rows), spec.columns), np.float32)
        float8.decode_e4m3(codes.reshape(out.shape), widen(raw, self.dense_dtype).reshape(-1, 1), out)
        return out.reshape(-1)

    def grid(self, spec: TensorSpec) -> LevelGrid | None:
        """All finite values of e4m3, one scale a row."""
        return LevelGrid(ordered_codes.E4M3.levels, spec.columns, scale_dtype(self.dense_dtype))

    def assemble(self, spec: TensorSpec, chosen: Chosen) -> Iterable[Piece]:
        """Codes and scales."""
        return Float8Encoder(spec, self.dense_dtype).pieces(ordered_codes.E4M3.codes[chosen.codes], chosen.scales, 0)

    def chosen(self, spec: TensorSpec, parts: Mapping[str, NDArray[np.uint8]]) -> Chosen:
        """Numbers of levels, of either zero the same, and the scales."""
        scales = widen(np.array(parts[f"{spec.module}.weight_scale"]), self.dense_dtype)
        return Chosen(ordered_codes.E4M3.numbers[parts[spec.name]].reshape(spec.shape), scales.reshape(-1, 1))

    def quantization_config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """The table of compressed-tensors."""
        weights, activations = arguments(8, "float", True, PER_CHANNEL), arguments(8, "float", True, PER_TOKEN)
        return table("float-quantized", weights, activations, kept)


@dataclass(frozen=True)
class Float8Encoder:
    """Codes rows; keeps no state."""

    spec: TensorSpec
    dtype: str
    searches: bool = False

    def encode(self, values: Float32, first_row: int) -> Iterable[Piece]:
        """Codes and scales of some rows at their places."""
        rows = rows_in(values, self.spec, self.dtype)
        scales = float8.fit_e4m3(rows, self.dtype)
        codes, dtype = np.empty(rows.shape, np.uint8), self.dtype
        if self.searches:
            scales, dtype = search_float_groups(rows, scales, E4M3, scales_in(self.dtype)), "F32"
        float8.encode_e4m3(rows, scales, dtype, codes)
        yield from self.pieces(codes, scales, first_row)

    def pieces(self, codes: UInt8, scales: Float32, first_row: int) -> Iterable[Piece]:
        """Rows of codes and scales at their places."""
        yield Piece(self.spec.name, first_row * self.spec.columns, codes.reshape(-1))
        raw = narrow(scales.reshape(-1), self.dtype)
        yield Piece(f"{self.spec.module}.weight_scale", first_row * ITEM_BYTES[self.dtype], raw)

    def seal(self) -> Iterable[Piece]:
        """Nothing is left to write."""
        return ()


def fp8(training: TrainingQuantization) -> Float8:
    """Merged weights in FP8."""
    return Float8(training.storage_dtype)
