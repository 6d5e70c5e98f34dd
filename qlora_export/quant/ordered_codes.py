"""The codes of a small float in ascending order of what they stand for, so that a level has a number of its own.

Codes that are no finite number have none, and the two zeros have one: that of the positive one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qlora_export.quant import float4, float8
from qlora_export.quant.floats import Float32, UInt8


@dataclass(frozen=True)
class OrderedCodes:
    """Ascending `levels`, the code of each, uint8 [levels], and the number of the level of each code, uint8 [codes]."""

    levels: tuple[float, ...]
    codes: UInt8
    numbers: UInt8


def ordered(values: Float32) -> OrderedCodes:
    """The order of codes that stand for these values [codes]."""
    finite = np.where(np.isfinite(values), values, 0)
    levels, codes = np.unique(finite, return_index=True)
    numbers = np.searchsorted(levels, finite)
    return OrderedCodes(tuple(float(level) + 0.0 for level in levels), codes.astype(np.uint8), numbers.astype(np.uint8))


E4M3 = ordered(float8.widen_e4m3(np.arange(256, dtype=np.uint8)))
E2M1 = ordered(float4.VALUES)
