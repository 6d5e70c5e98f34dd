"""e2m1, the 4-bit float of NVFP4 and MXFP4: a sign, 2 exponent bits, 1 mantissa bit; 0, 0.5, 1, 1.5, 2, 3, 4, 6.

    code = nearest(clamp(w / step, -6, 6)), ties to the even code;   w' = value(code) * step
    NVFP4, groups of 16:   scale = e4m3(absmax / 6 * global),    step = scale / global
    MXFP4, groups of 32:   step = 2^(exponent(absmax) - 2), the exponent one more from a mantissa of 1.75 on

byte for byte as compressed-tensors 0.20 on a CPU, for bf16 weights: absmax / 6 is rounded to bf16, a local scale of
zero becomes 0.125, the quotient is float32 for NVFP4 and bf16 for MXFP4, only what lies below zero has a sign. Values,
steps and codes are [rows, columns], [rows, groups], uint8 [rows, columns / 2], the first of a pair in the low nibble.
An MXFP4 step is stored as the byte 127 + exponent, E8M0. Source: OCP Microscaling Formats (MX) 1.0, compressed-tensors
`quantization/utils/fp4_utils.py`, `mxfp_utils.py`. Cost: one pass over memory, a division and a count a weight.
"""

from __future__ import annotations

import numba
import numpy as np

from qlora_export.quant import float8
from qlora_export.quant.floats import Float32, UInt8
from qlora_export.quant.scales import group_absmax, symmetric

LARGEST = 6.0
VALUES: Float32 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
ZERO_SCALE = np.uint8(0x20)  # 0.125, the library's epsilon of e4m3
VANISHING_BFLOAT16 = np.float32(2.0**-134)
NOTHING = np.float32(0)
NEXT_POWER = np.float32(7 / 12)  # a sixth of a mantissa of 1.75, where frexp begins an octave at 1 / 2


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _code(quotient: np.float32) -> np.uint8:
    size = abs(quotient)
    code = np.uint8(
        (size > 0.25) + (size >= 0.75) + (size > 1.25) + (size >= 1.75) + (size > 2.5) + (size >= 3.5) + (size > 5)
    )
    return np.uint8(code | (np.uint8(8) if quotient < 0 else np.uint8(0)))


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def encode(values: Float32, steps: Float32, vanishing: np.float32, out: UInt8) -> None:
    """Codes of [rows, columns] into `out`; quotients of magnitudes up to `vanishing` are zero."""
    rows, groups = steps.shape
    size = values.shape[1] // max(groups, 1)
    for row in range(rows):
        for group in range(groups):
            part = values[row, group * size : (group + 1) * size]
            codes = out[row, group * size // 2 : (group + 1) * size // 2]
            step = steps[row, group]
            for pair in range(codes.size):
                low, high = np.float32(part[2 * pair] / step), np.float32(part[2 * pair + 1] / step)
                low = np.float32(0) if abs(low) <= vanishing else low
                high = np.float32(0) if abs(high) <= vanishing else high
                codes[pair] = np.uint8(_code(low) | np.uint8(_code(high) << np.uint8(4)))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def decode(codes: UInt8, steps: Float32, levels: Float32, out: Float32) -> None:
    """Float32 values of codes into `out` [rows, columns]; `levels` are `VALUES`."""
    rows, groups = steps.shape
    size = out.shape[1] // max(groups, 1)
    for row in range(rows):
        for group in range(groups):
            part = codes[row, group * size // 2 : (group + 1) * size // 2]
            values = out[row, group * size : (group + 1) * size]
            step = steps[row, group]
            for pair in range(part.size):
                values[2 * pair] = levels[part[pair] & np.uint8(15)] * step
                values[2 * pair + 1] = levels[part[pair] >> np.uint8(4)] * step


def fit_nvfp4(values: Float32, group: int, global_scale: float) -> UInt8:
    """The e4m3 scales [rows, groups] of bf16 values, saturated at 448."""
    largest = group_absmax(values, values.shape[1] // group)
    # A division by 6 in bf16, but no epsilon: a group of zeros is told by the scale that comes out.
    sixths = symmetric(largest, LARGEST, "BF16")
    sixths[largest == 0] = 0
    return nvfp4_scales(sixths, global_scale)


def nvfp4_scales(steps: Float32, global_scale: float) -> UInt8:
    """The e4m3 scales nearest to steps of any shape that are not negative; no scale is zero."""
    wanted = (steps * np.float32(global_scale)).reshape(1, -1)
    scales = np.empty(wanted.shape, np.uint8)
    float8.encode_e4m3(wanted, np.ones((1, 1), np.float32), "F32", scales)
    scales[scales == 0] = ZERO_SCALE
    return scales.reshape(steps.shape)


def nvfp4_steps(scales: UInt8, global_scale: float) -> Float32:
    """The steps of e4m3 scales of any shape."""
    steps: Float32 = float8.widen_e4m3(scales).reshape(scales.shape) / np.float32(global_scale)
    return steps


def fit_mxfp4(values: Float32, group: int) -> UInt8:
    """The E8M0 exponents [rows, groups] of bf16 values."""
    bits = group_absmax(values, values.shape[1] // group).view(np.uint32)
    exponents = ((bits + np.uint32(1 << 21)) >> np.uint32(23)).astype(np.int32) - 2
    return np.maximum(exponents, 0).astype(np.uint8)


def mxfp4_exponents(steps: Float32) -> UInt8:
    """The E8M0 exponents of steps of any shape: of a sixth of an absmax, those that `fit_mxfp4` gives the absmax."""
    mantissas, exponents = np.frexp(steps)
    rounded = exponents - (mantissas < NEXT_POWER) + 127
    return np.where(steps > 0, rounded, 0).clip(0, 254).astype(np.uint8)


def mxfp4_steps(exponents: UInt8) -> Float32:
    """The steps of exponents of any shape."""
    steps: Float32 = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
    return steps
