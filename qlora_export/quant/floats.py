"""16-bit floats as integers: bf16 and fp16 to float32 and back, rounded to nearest even.

bf16 is the upper half of a float32, so widening is a shift and narrowing adds half of the last kept bit:
`(bits + 0x7fff + ((bits >> 16) & 1)) >> 16`. One pass over memory each way. Values are expected to be finite.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import extending
from numpy.typing import NDArray

from qlora_export.quant.precision import round_any

Float32 = NDArray[np.float32]
UInt16 = NDArray[np.uint16]
UInt32 = NDArray[np.uint32]
UInt8 = NDArray[np.uint8]


def float32_bits(value: Any) -> Any:
    """The bits of a float32, or of the float32 that bf16 bits (uint16) stand for; one operation in compiled code."""
    return np.uint32(value) << np.uint32(16) if isinstance(value, np.uint16) else np.float32(value).view(np.uint32)


@extending.overload(float32_bits)
def _float32_bits(value):  # type: ignore[no-untyped-def]  # numba compares the two signatures, annotations included
    if value == numba.types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16))
    return lambda value: np.float32(value).view(np.uint32)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def float32_of(value: Any) -> Any:
    """A float32 as it is, or the value of bf16 bits."""
    return np.uint32(float32_bits(value)).view(np.float32)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def widen_bfloat16(bits: UInt16, out: UInt32) -> None:
    """Widen flat bf16 bits into flat float32 bits."""
    for index in range(bits.size):
        out[index] = np.uint32(bits[index]) << np.uint32(16)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def narrow_bfloat16(bits: UInt32, out: UInt16) -> None:
    """Round flat float32 bits to flat bf16 bits, ties to even."""
    for index in range(bits.size):
        value = bits[index]
        out[index] = np.uint16((value + np.uint32(0x7FFF) + ((value >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def round_bfloat16(bits: UInt32) -> None:
    """Round flat float32 bits to the nearest bf16, in place, still as float32 bits."""
    for index in range(bits.size):
        value = bits[index]
        rounded = value + np.uint32(0x7FFF) + ((value >> np.uint32(16)) & np.uint32(1))
        bits[index] = rounded & np.uint32(0xFFFF0000)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def round_float16(values: Float32) -> None:
    """Round flat float32 to the nearest fp16, in place; numpy's conversions take six times as long."""
    for index in range(values.size):
        values[index] = round_any(values[index], np.uint32(13))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def all_finite_16(bits: UInt16, exponent: np.uint16) -> bool:
    """Whether no 16-bit float has all bits of `exponent` set: 0x7f80 for bf16, 0x7c00 for fp16."""
    found = False
    for index in range(bits.size):
        found |= (bits[index] & exponent) == exponent
    return not found


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def all_finite(bits: UInt32) -> bool:
    """Whether no float32 of these flat bits is NaN or infinite."""
    worst = np.uint32(0)
    for index in range(bits.size):
        worst = max(worst, bits[index] & np.uint32(0x7FFFFFFF))
    return bool(worst < np.uint32(0x7F800000))
