"""float8_e4m3fn: 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinity, 0x7f and 0xff are NaN.

Source: OCP 8-bit floating point specification (OFP8), arXiv 2209.05433. Cost: one table look-up a value.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from qlora_export.quant.floats import Float32, UInt8


@cache
def _table() -> Float32:
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    values: Float32 = np.where(codes & 128, -magnitude, magnitude).astype(np.float32)
    values[[0x7F, 0xFF]] = np.nan
    return values


def widen_e4m3(raw: UInt8) -> Float32:
    """The float32 values of raw bytes."""
    values: Float32 = _table()[raw]
    return values
