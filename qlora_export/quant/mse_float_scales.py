"""The scale of each group that leaves the smallest squared error on a grid of small floats, without data.

    minimise over s   sum_i (x_i - s * nearest(x_i / s))^2   over the columns of a group, in all rows that share it

Candidates are those of `mse_scales.py`: the scale of nearest, which wins ties, 43 fractions of the one that brings
the largest magnitude to the largest level, and two least-squares refits, each as it can be stored. So the error of a
group is never above that of nearest.

A small float is told by its mantissa bits, the exponent below which its steps stay as they are, and its largest value:
`nearest(q) = (q + m) - m`, with m = 1.5 * 2^23 steps of q's octave, made from the bits of q's exponent. Integers up to
127 are such a float, all of whose steps are one. Errors are summed by `group_sums.py`. Cost: 44 evaluations a weight,
in vectors over the candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from qlora_export.quant.floats import Float32
from qlora_export.quant.group_sums import Float64, add_errors, products_of
from qlora_export.quant.mse_scales import FRACTIONS, REFITS
from qlora_export.quant.scales import group_absmax

# What a layout can store of scales, elementwise.
Stored = Callable[[Float32], Float32]


@dataclass(frozen=True)
class SmallFloat:
    """A float of few bits: of its mantissa, the exponent of its smallest octave, its largest value."""

    mantissa_bits: int
    smallest_exponent: int
    largest: float

    @property
    def levels(self) -> tuple[np.float32, np.uint32, np.uint32]:
        """The largest value, and bits: of the smallest octave, and from an octave to 1.5 * 2^23 of its steps."""
        first = np.uint32((self.smallest_exponent + 127) << 23)
        return np.float32(self.largest), first, np.uint32(((23 - self.mantissa_bits) << 23) + (1 << 22))


E4M3 = SmallFloat(3, -6, 448.0)
E2M1 = SmallFloat(1, 0, 6.0)
INTEGERS = SmallFloat(7, 7, 127.0)


def search_float_groups(
    values: Float32, scales: Float32, small: SmallFloat, stored: Stored, height: int = 1
) -> Float32:
    """Scales [blocks, groups] of values [rows, columns], as `stored` has them; `scales` are those of nearest.

    `height` rows share a scale; the last block may be short.
    """
    largest = group_absmax(values, scales.shape[1], height) / np.float32(small.largest)
    tried = np.concatenate([scales[..., None], stored(largest[..., None] * FRACTIONS)], axis=2)
    errors = np.empty(tried.shape, np.float64)
    _errors(values, tried, height, small.levels, errors)
    chosen = errors.argmin(axis=2)[..., None]
    best, least = np.take_along_axis(tried, chosen, 2)[..., 0], np.take_along_axis(errors, chosen, 2)[..., 0]
    for _ in range(REFITS):
        refit = _refit(values, best, height, small, stored)
        error = np.empty((*best.shape, 1), np.float64)
        _errors(values, refit[..., None], height, small.levels, error)
        better = error[..., 0] < least
        best, least = np.where(better, refit, best), np.where(better, error[..., 0], least)
    return best


def _refit(values: Float32, scales: Float32, height: int, small: SmallFloat, stored: Stored) -> Float32:
    """Least squares for the levels that these scales choose."""
    products, squares = np.zeros(scales.shape, np.float64), np.zeros(scales.shape, np.float64)
    _add_products(values, scales, height, small.levels, products, squares)
    fitted = np.divide(products, squares, out=scales.astype(np.float64), where=squares > 0)
    return stored(fitted.astype(np.float32))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _nearest(place: np.float32, levels: Any) -> np.float32:
    largest, smallest_bits, offset = levels
    clamped = np.float32(min(max(place, -largest), largest))
    octave = np.uint32(max(np.uint32(clamped.view(np.uint32) & np.uint32(0x7F800000)), smallest_bits))
    rounder = np.uint32(octave + offset).view(np.float32)
    return np.float32(np.float32(clamped + rounder) - rounder)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _reciprocal(scale: np.float32) -> np.float32:
    return np.float32(1) / scale if scale > 0 else np.float32(0)


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _errors(values: Float32, tried: Float32, height: int, levels: Any, errors: Float64) -> None:
    """Squared errors [blocks, groups, candidates] of the scales tried, of the same shape."""
    blocks, groups, candidates = tried.shape
    size = values.shape[1] // max(groups, 1)
    reciprocals, sums = np.empty(candidates, np.float32), np.empty(candidates, np.float32)
    errors[:] = 0
    for block in range(blocks):
        for group in range(groups):
            for candidate in range(candidates):
                reciprocals[candidate] = _reciprocal(tried[block, group, candidate])
            for row in range(block * height, min((block + 1) * height, len(values))):
                part = values[row, group * size : (group + 1) * size]
                add_errors(part, tried[block, group], reciprocals, _nearest, levels, sums, errors[block, group])


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _add_products(
    values: Float32, scales: Float32, height: int, levels: Any, products: Float64, squares: Float64
) -> None:
    """`sum x l` and `sum l^2` of every group."""
    groups = scales.shape[1]
    size = values.shape[1] // max(groups, 1)
    for row in range(len(values)):
        block = row // height
        for group in range(groups):
            part, reciprocal = values[row, group * size : (group + 1) * size], _reciprocal(scales[block, group])
            product, square = products_of(part, reciprocal, _nearest, levels)
            products[block, group] += product
            squares[block, group] += square
