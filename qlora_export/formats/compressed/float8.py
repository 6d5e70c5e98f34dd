"""compressed-tensors FP8: `fp8`, merged weights in float8_e4m3 with one scale a row, activations in FP8 token by token.

For a linear `x.weight` of shape [out, in]: `x.weight` float8_e4m3fn [out, in]; `x.weight_scale` [out, 1] in the model's
dtype. Equations: `quant/float8.py`. vLLM calls it FP8_DYNAMIC; it multiplies in FP8 on GPUs from compute capability 8.9
on. Source: compressed-tensors `compressors/naive_quantized`. Cost: 8 bits a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_export.contracts import Consumes, Float32, Part, Piece, TensorSpec, TrainingQuantization
from qlora_export.formats.compressed.stated import INPUT_MAJOR, PER_CHANNEL, PER_TOKEN, arguments, rows_in, table
from qlora_export.quant import float8
from qlora_export.tensors.dtypes import ITEM_BYTES, narrow, widen


@dataclass(frozen=True)
class Float8:
    """Weights in float8_e4m3; dense tensors and scales have the dtype that the base was loaded in."""

    dense_dtype: str
    name: str = "fp8"
    consumes: Consumes = "merged"
    quantises: bool = True
    keeps_adapter: bool = False
    beside_experts: bool = True

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
        return Float8Encoder(spec, self.dense_dtype)

    def decode(self, spec: TensorSpec, parts: Mapping[str, NDArray[np.uint8]], rows: range) -> Float32:
        """Flat float32 values of some rows, before rounding to the dtype."""
        item = ITEM_BYTES[self.dense_dtype]
        raw = np.array(parts[f"{spec.module}.weight_scale"][rows.start * item : rows.stop * item])
        codes = parts[spec.name][rows.start * spec.columns : rows.stop * spec.columns]
        out = np.empty((len(rows), spec.columns), np.float32)
        float8.decode_e4m3(codes.reshape(out.shape), widen(raw, self.dense_dtype).reshape(-1, 1), out)
        return out.reshape(-1)

    def quantization_config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """The table of compressed-tensors."""
        weights, activations = arguments(8, "float", True, PER_CHANNEL), arguments(8, "float", True, PER_TOKEN)
        return table("float-quantized", weights, activations, kept)


@dataclass(frozen=True)
class Float8Encoder:
    """Codes rows; keeps no state."""

    spec: TensorSpec
    dtype: str

    def encode(self, values: Float32, first_row: int) -> Iterable[Piece]:
        """Codes and scales of some rows at their places."""
        rows = rows_in(values, self.spec, self.dtype)
        scales = float8.fit_e4m3(rows, self.dtype)
        codes = np.empty(rows.shape, np.uint8)
        float8.encode_e4m3(rows, scales, self.dtype, codes)
        yield Piece(self.spec.name, first_row * self.spec.columns, codes.reshape(-1))
        raw = narrow(scales.reshape(-1), self.dtype)
        yield Piece(f"{self.spec.module}.weight_scale", first_row * ITEM_BYTES[self.dtype], raw)

    def seal(self) -> Iterable[Piece]:
        """Nothing is left to write."""
        return ()


def fp8(training: TrainingQuantization) -> Float8:
    """Merged weights in FP8, rounded to nearest."""
    return Float8(training.storage_dtype)
