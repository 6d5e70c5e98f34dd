"""float8_e4m3fn: 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinity, 0x7f and 0xff are NaN. Scaled per row.

    scale = absmax / 448,   code = nearest(clamp(w / scale, -448, 448)),   w' = value(code) * scale

byte for byte as compressed-tensors 0.20 and torch on a CPU: scale and quotient are rounded to the weight's dtype before
the code is chosen, ties to even, and every zero quotient is +0, since the library adds a zero point of zero. From 2^-6
on, a code is the float's own bits, rounded at the 20th and with another bias; below, it counts steps of 2^-9, which a
sum with 2^14 leaves in the last bits. Values are [rows, columns], scales float32 [rows, 1], or [rows, groups] along
the columns; one scale for a tensor is the same in every row, from `scales.symmetric` of the tensor's absmax.
Source: OCP 8-bit floating point specification (OFP8), arXiv 2209.05433.
Cost: one pass over memory each; the exact value of a code needs no table but one product with a power of two.
"""

from __future__ import annotations

import numba
import numpy as np

from qlora_export.quant.floats import Float32, UInt8
from qlora_export.quant.precision import DROPPED_BITS, VANISHING, round_normal
from qlora_export.quant.scales import group_absmax, symmetric

LARGEST = 448.0


def fit_e4m3(values: Float32, dtype: str, groups: int = 1, height: int = 1) -> Float32:
    """Scales [blocks, groups] of [rows, columns], where `height` rows share theirs."""
    return symmetric(group_absmax(values, groups, height), LARGEST, dtype)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _code(value: np.float32) -> np.uint8:
    """The nearest code of a float32, saturated at 448; NaN stays NaN."""
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    clamped = np.uint32(min(magnitude, np.uint32(0x43E00000)))
    even = np.uint32(np.uint32(clamped >> np.uint32(20)) & np.uint32(1))
    rounded = np.uint32(np.uint32(clamped + np.uint32(0x7FFFF)) + even)
    normal = np.uint32(np.uint32(rounded >> np.uint32(20)) - np.uint32(120 << 3))
    sum_bits = np.float32(np.uint32(clamped).view(np.float32) + np.float32(2**14)).view(np.uint32)
    code = normal if clamped >= np.uint32(0x3C800000) else np.uint32(sum_bits & np.uint32(0xFF))
    code = np.uint32(0x7F) if magnitude > np.uint32(0x7F800000) else code
    return np.uint8(np.uint32(code) | np.uint32(np.uint32(bits >> np.uint32(24)) & np.uint32(0x80)))


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _encode(values: Float32, scales: Float32, dropped: np.uint32, vanishing: np.float32, out: UInt8) -> None:
    rows, groups = scales.shape
    size = values.shape[1] // max(groups, 1)
    for row in range(rows):
        for group in range(groups):
            part = values[row, group * size : (group + 1) * size]
            codes = out[row, group * size : (group + 1) * size]
            scale = scales[row, group]
            for index in range(part.size):
                quotient = np.float32(part[index] / scale)
                quotient = np.float32(0) if abs(quotient) <= vanishing else quotient
                codes[index] = _code(round_normal(quotient, dropped))


def encode_e4m3(values: Float32, scales: Float32, dtype: str, out: UInt8) -> None:
    """Codes of [rows, columns] of a weight of this dtype into `out` of the same shape."""
    _encode(values, scales, DROPPED_BITS[dtype], VANISHING[dtype], out)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def decode_e4m3(codes: UInt8, scales: Float32, out: Float32) -> None:
    """The values of codes [rows, columns] into float32 `out`; rounding them to the dtype gives the library's bytes."""
    rows, groups = scales.shape
    size = codes.shape[1] // max(groups, 1)
    for row in range(rows):
        for group in range(groups):
            part = codes[row, group * size : (group + 1) * size]
            values = out[row, group * size : (group + 1) * size]
            scale = scales[row, group]
            for index in range(part.size):
                code = np.uint32(part[index])
                magnitude = np.uint32(code & np.uint32(0x7F))
                widened = np.uint32(magnitude << np.uint32(20))
                widened = np.uint32(0x7FC00000) if magnitude == np.uint32(0x7F) else widened
                signed = np.uint32(widened | np.uint32(np.uint32(code & np.uint32(0x80)) << np.uint32(24)))
                values[index] = np.float32(np.uint32(signed).view(np.float32) * np.float32(2.0**120)) * scale


def widen_e4m3(raw: UInt8) -> Float32:
    """The float32 values of raw bytes."""
    values = np.empty(raw.shape, np.float32)
    decode_e4m3(np.ascontiguousarray(raw).reshape(1, -1), np.ones((1, 1), np.float32), values.reshape(1, -1))
    return values
