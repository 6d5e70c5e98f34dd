"""A format that the catalog does not have: float32 with a mantissa of ten bits, which transformers loads as dense."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qlora_export.formats.dense import Dense
from qlora_export.types import Float32, Piece, TensorSpec, TrainingQuantization

DROPPED_BITS = 13


@dataclass(frozen=True, kw_only=True)
class Tf32(Dense):
    """Weights stored in 32 bits, the last 13 of them zero; rounded to nearest even before they are stored."""

    def _encode(self, spec: TensorSpec, values: Float32, first_row: int) -> Iterable[Piece]:
        return super()._encode(spec, rounded(values), first_row)


def rounded(values: Float32) -> Float32:
    """Flat float32 values with ten bits of mantissa."""
    bits = values.view(np.uint32)
    odd = bits >> np.uint32(DROPPED_BITS) & np.uint32(1)
    half = np.uint32(2 ** (DROPPED_BITS - 1) - 1)
    return (bits + half + odd & np.uint32(-(2**DROPPED_BITS) % 2**32)).view(np.float32)


def tf32(training: TrainingQuantization) -> Tf32:
    """The format, as its row names it."""
    return Tf32(name="tf32", dense_dtype="F32")
