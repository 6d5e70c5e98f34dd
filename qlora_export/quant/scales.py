"""The range of each group of a weight, and the scale and zero point of that range, as compressed-tensors 0.20 has them.

    symmetric:   scale = absmax / half the number of steps                                            zero = 0
    asymmetric:  scale = (high - low) / number of steps       zero = nearest(clamp(first - low / scale, first, last))

with low <= 0 <= high, `first` the lowest code, and every operation rounded to the dtype of the weight, which is that of
the scales too. A scale of zero becomes the dtype's epsilon; where it came from 0 / 0, the zero point is 0. A range that
the dtype cannot hold has an infinite scale, as there. Groups lie along the columns of [rows, columns] and are
whole: as many columns each as there are in a row, divided by the groups of the output.
Source: compressed-tensors `quantization/utils/helpers.py: calculate_qparams`. Cost: one pass over memory for a range;
floats are compared as integers, which is the same order and lets the compiler use whole vectors.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from qlora_export.quant.floats import Float32
from qlora_export.quant.precision import DROPPED_BITS, round_any, to_int8

Int8 = NDArray[np.int8]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def absmax(values: Float32, out: Float32) -> None:
    """Largest magnitude of every group of [rows, columns] into [rows, groups]."""
    rows, groups = out.shape
    size = values.shape[1] // max(groups, 1)
    bits, largest = values.view(np.uint32), out.view(np.uint32)
    for row in range(rows):
        for group in range(groups):
            part = bits[row, group * size : (group + 1) * size]
            most = np.uint32(0)
            for index in range(part.size):
                most = np.uint32(max(most, np.uint32(part[index] & np.uint32(0x7FFFFFFF))))
            largest[row, group] = most


def group_absmax(values: Float32, groups: int, height: int = 1) -> Float32:
    """Largest magnitudes [blocks, groups] of [rows, columns], `height` rows a block; the last may have fewer."""
    largest = np.empty((len(values), groups), np.float32)
    absmax(values, largest)
    return largest if height == 1 else np.maximum.reduceat(largest, np.arange(0, len(values), height), axis=0)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def extremes(values: Float32, lows: Float32, highs: Float32) -> None:
    """Smallest and largest value of every group, zero included, of [rows, columns] into two [rows, groups].

    As unsigned integers the most negative float is the largest of all; as signed ones negative floats are below zero.
    """
    rows, groups = lows.shape
    size = values.shape[1] // max(groups, 1)
    bits, least, largest = values.view(np.uint32), lows.view(np.uint32), highs.view(np.int32)
    for row in range(rows):
        for group in range(groups):
            part = bits[row, group * size : (group + 1) * size]
            low, high = np.uint32(0x80000000), np.int32(0)
            for index in range(part.size):
                low = np.uint32(max(low, part[index]))
                high = np.int32(max(high, np.int32(part[index])))
            least[row, group], largest[row, group] = low, high


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _or_epsilon(scale: np.float32, dropped: np.uint32) -> np.float32:
    if scale == 0:
        return np.float32(2.0 ** (np.float64(dropped) - 23))
    return scale


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _symmetric(largest: Float32, half_steps: np.float32, dropped: np.uint32, out: Float32) -> None:
    for row in range(out.shape[0]):
        for group in range(out.shape[1]):
            out[row, group] = _or_epsilon(round_any(largest[row, group] / half_steps, dropped), dropped)


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _asymmetric(lows: Float32, scales: Float32, bits: int, dropped: np.uint32, zeros: Int8) -> None:
    """Scales and zero points of the ranges that begin at `lows` and end at the values that `scales` come with."""
    steps, first = np.float32((1 << bits) - 1), np.float32(-(1 << (bits - 1)))
    for row in range(lows.shape[0]):
        for group in range(lows.shape[1]):
            low = lows[row, group]
            scale = round_any(round_any(scales[row, group] - low, dropped) / steps, dropped)
            zeros[row, group] = 0
            if scale != 0 or low != 0:
                zero = round_any(first - round_any(low / scale, dropped), dropped)
                zeros[row, group] = to_int8(min(max(zero, first), first + steps))
            scales[row, group] = _or_epsilon(scale, dropped)


def symmetric(largest: Float32, half_steps: float, dtype: str) -> Float32:
    """Scales of groups of these absmax: 7.5 half steps for 4 bits, 127.5 for 8, 448 for e4m3."""
    out = np.empty_like(largest)
    _symmetric(largest, np.float32(half_steps), DROPPED_BITS[dtype], out)
    return out


def asymmetric(lows: Float32, highs: Float32, bits: int, dtype: str) -> tuple[Float32, Int8]:
    """Scales and zero points of groups of these extremes."""
    scales, zeros = highs.copy(), np.empty(highs.shape, np.int8)
    _asymmetric(lows, scales, bits, DROPPED_BITS[dtype], zeros)
    return scales, zeros
