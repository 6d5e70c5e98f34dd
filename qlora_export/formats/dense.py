"""Dense 16 and 32-bit weights: one part a tensor, the shape of the source, rounded once to nearest even.

On disk: plain safetensors, no `quantization_config`. Cost: 2 or 4 bytes a weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qlora_export.formats.base import Format, RowEncoder, Stored
from qlora_export.formats.rows import overflow, row_piece, stored_rows
from qlora_export.quant.floats import all_finite_16
from qlora_export.types import TORCH_NAMES, Float32, Part, Piece, Rounding, TensorSpec, TrainingQuantization

# Exponent bits of infinity, and the largest finite value.
LARGEST = {"F16": (0x7C00, 65504.0), "BF16": (0x7F80, 3.3895314e38)}


@dataclass(frozen=True, kw_only=True)
class Dense(Format):
    """Weights of one floating dtype."""

    quantises: bool = False

    @property
    def roundings(self) -> tuple[Rounding, ...]:
        """None: nothing is quantised."""
        return ()

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """The tensor itself in the dense dtype."""
        return (Part(spec.name, self.dense_dtype, spec.shape),)

    def open(self, spec: TensorSpec) -> RowEncoder:
        """Start encoding a tensor."""
        return RowEncoder(self._encode, spec)

    def _encode(self, spec: TensorSpec, values: Float32, first_row: int) -> Iterable[Piece]:
        """Raises InputError when a value overflows the dtype."""
        dtype, (part,) = self.dense_dtype, self.parts(spec)
        piece = row_piece(part, values, first_row)
        exponent, largest = LARGEST.get(dtype, (0, 0.0))
        if exponent and not all_finite_16(piece.data.view(np.uint16), np.uint16(exponent)):
            limit = f"{TORCH_NAMES[dtype]} ends at {largest:g}"
            raise overflow(values, spec, limit, "choose a wider dtype for this artifact")
        return (piece,)

    def decode(self, spec: TensorSpec, parts: Stored, rows: range) -> Float32:
        """Flat float32 values of the stored rows."""
        values: Float32 = stored_rows(parts, self.parts(spec)[0], rows).reshape(-1)
        return values


def fp32(training: TrainingQuantization) -> Dense:
    """32-bit weights."""
    return Dense(name="fp32", dense_dtype="F32")


def bf16(training: TrainingQuantization) -> Dense:
    """bfloat16 weights."""
    return Dense(name="bf16", dense_dtype="BF16")


def fp16(training: TrainingQuantization) -> Dense:
    """IEEE half-precision weights."""
    return Dense(name="fp16", dense_dtype="F16")
