"""The scale of each group that leaves the smallest squared error on a grid of small floats, without data.

    minimise over s   sum_i (x_i - s * nearest(x_i / s))^2   over the columns of a group, in all rows that share it

Candidates are those of `searched_scales.py`: the scale of nearest, which wins ties, 43 fractions of the one that brings
the largest magnitude to the largest level, and two least-squares refits, each as it can be stored. So the error of a
group is never above that of nearest.

A small float is told by its mantissa bits, the exponent below which its steps stay as they are, and its largest value:
`nearest(q) = (q + m) - m`, with m = 1.5 * 2^23 steps of q's octave, made from the bits of q's exponent. Integers up to
127 are such a float, all of whose steps are one. Errors are summed in the order of the columns, in float32 for at most
128 of them, so they depend neither on the machine nor on the cut into row blocks. Cost: 43 evaluations a weight, in
vectors over the candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from qlora_export.quant.floats import Float32
from qlora_export.quant.mse_scales import FRACTIONS, PIECE, REFITS
from qlora_export.quant.scales import absmax

Float64 = NDArray[np.float64]
# What a layout can store of scales, elementwise.
Stored = Callable[[Float32], Float32]


@dataclass(frozen=True)
class SmallFloat:
    """A float of few bits: of its mantissa, the exponent of its smallest octave, its largest value."""

    mantissa_bits: int
    smallest_exponent: int
    largest: float

    @property
    def smallest_bits(self) -> np.uint32:
        """The float32 bits of the power of two that begins the smallest octave."""
        return np.uint32((self.smallest_exponent + 127) << 23)

    @property
    def rounder_offset(self) -> np.uint32:
        """What leads from the bits of an octave to those of 1.5 * 2^23 of its steps."""
        return np.uint32(((23 - self.mantissa_bits) << 23) + (1 << 22))


E4M3 = SmallFloat(3, -6, 448.0)
E2M1 = SmallFloat(1, 0, 6.0)
INTEGERS = SmallFloat(7, 7, 127.0)


def search_float_groups(
    values: Float32, scales: Float32, small: SmallFloat, stored: Stored, height: int = 1
) -> Float32:
    """Scales [blocks, groups] of values [rows, columns], as `stored` has them; `scales` are those of nearest.

    `height` rows share a scale; the last block may be short.
    """
    bits = (np.float32(small.largest), small.smallest_bits, small.rounder_offset)
    largest = _largest(values, scales.shape[1], height) / bits[0]
    tried = np.concatenate([scales[..., None], stored(largest[..., None] * FRACTIONS)], axis=2)
    errors = np.empty(tried.shape, np.float64)
    _errors(values, tried, height, *bits, errors)
    chosen = errors.argmin(axis=2)[..., None]
    best, least = np.take_along_axis(tried, chosen, 2)[..., 0], np.take_along_axis(errors, chosen, 2)[..., 0]
    for _ in range(REFITS):
        refit = _refit(values, best, height, bits, stored)
        error = np.empty((*best.shape, 1), np.float64)
        _errors(values, refit[..., None], height, *bits, error)
        better = error[..., 0] < least
        best, least = np.where(better, refit, best), np.where(better, error[..., 0], least)
    return best


def _largest(values: Float32, groups: int, height: int) -> Float32:
    """The largest magnitude [blocks, groups]."""
    of_rows = np.empty((len(values), groups), np.float32)
    absmax(values, of_rows)
    return np.maximum.reduceat(of_rows, np.arange(0, len(values), height), axis=0)


def _refit(
    values: Float32, scales: Float32, height: int, bits: tuple[np.float32, np.uint32, np.uint32], stored: Stored
) -> Float32:
    """Least squares for the levels that these scales choose."""
    products, squares = np.zeros(scales.shape, np.float64), np.zeros(scales.shape, np.float64)
    _add_products(values, scales, height, *bits, products, squares)
    fitted = np.divide(products, squares, out=scales.astype(np.float64), where=squares > 0)
    return stored(fitted.astype(np.float32))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _nearest(value: np.float32, largest: np.float32, smallest_bits: np.uint32, offset: np.uint32) -> np.float32:
    clamped = np.float32(min(max(value, -largest), largest))
    octave = np.uint32(max(np.uint32(clamped.view(np.uint32) & np.uint32(0x7F800000)), smallest_bits))
    rounder = np.uint32(octave + offset).view(np.float32)
    return np.float32(np.float32(clamped + rounder) - rounder)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _reciprocal(scale: np.float32) -> np.float32:
    return np.float32(1) / scale if scale > 0 else np.float32(0)


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _errors(
    values: Float32,
    tried: Float32,
    height: int,
    largest: np.float32,
    smallest_bits: np.uint32,
    offset: np.uint32,
    errors: Float64,
) -> None:
    """Squared errors [blocks, groups, candidates] of the scales tried, of the same shape."""
    blocks, groups, candidates = tried.shape
    size = values.shape[1] // max(groups, 1)
    scales, reciprocals = np.empty(candidates, np.float32), np.empty(candidates, np.float32)
    sums, totals = np.empty(candidates, np.float32), np.empty(candidates, np.float64)
    for block in range(blocks):
        for group in range(groups):
            for candidate in range(candidates):
                scales[candidate] = tried[block, group, candidate]
                reciprocals[candidate] = _reciprocal(scales[candidate])
            totals[:] = 0
            for row in range(block * height, min((block + 1) * height, len(values))):
                part = values[row, group * size : (group + 1) * size]
                for first in range(0, part.size, PIECE):
                    sums[:] = 0
                    for value in part[first : first + PIECE]:
                        for candidate in range(candidates):
                            place = _nearest(value * reciprocals[candidate], largest, smallest_bits, offset)
                            gap = value - place * scales[candidate]
                            sums[candidate] += gap * gap
                    for candidate in range(candidates):
                        totals[candidate] += sums[candidate]
            errors[block, group] = totals


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _add_products(
    values: Float32,
    scales: Float32,
    height: int,
    largest: np.float32,
    smallest_bits: np.uint32,
    offset: np.uint32,
    products: Float64,
    squares: Float64,
) -> None:
    """`sum x l` and `sum l^2` of every group."""
    groups = scales.shape[1]
    size = values.shape[1] // max(groups, 1)
    for row in range(len(values)):
        block = row // height
        for group in range(groups):
            reciprocal = _reciprocal(scales[block, group])
            product, square = np.float64(0), np.float64(0)
            for value in values[row, group * size : (group + 1) * size]:
                level = np.float64(_nearest(value * reciprocal, largest, smallest_bits, offset))
                product += level * np.float64(value)
                square += level * level
            products[block, group] += product
            squares[block, group] += square
