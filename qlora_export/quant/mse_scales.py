"""The scale of each group that leaves the smallest squared error of the nearest levels, without data.

    minimise over s   sum_i (x_i - s * level(x_i / s))^2,   s in {s0, f * s1 for f in 0.70, 0.71 ... 1.12, refit, refit}
    integers:         level(q) = min(max(round(q), -2^(b-1) - zero), 2^(b-1) - 1 - zero)
    refit             s = sum_i x_i l_i / sum_i l_i^2,   l_i = level(x_i / s) for the best s so far

`s0` is the scale that rounding to nearest has: it comes first and wins ties, so a group's error is never above that
of nearest. `s1` brings the largest magnitude to the outermost level; with zero points it is `s0`, and codes count
from the zero point. What is stored of a scale, a 16-bit float, is what is tried. The same search on torch tensors, with
weights for the columns, is `rounding/scale_search.py`.

Of the 16 levels of a 4-bit float, a growing fraction moves a value from level to level towards zero, so only the moves
are summed. Of integers the errors of all candidates are, side by side (`group_sums.py`). Scales are positive: that
every reader multiplies by a negative one is not proven (`docs/decisions/023-rounding-without-data.md`). Cost: integers,
44 evaluations a weight in vectors and four by one.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from qlora_export.quant.floats import Float32
from qlora_export.quant.four_bit import FourBitGrid, fifteen, nearest_number
from qlora_export.quant.group_sums import PIECE, Float64, add_errors, products_of
from qlora_export.quant.integers import Grid
from qlora_export.quant.precision import DROPPED_BITS, ROUNDER, round_any
from qlora_export.quant.scales import Int8

FRACTIONS = np.array([0.70 + 0.01 * step for step in range(43)], np.float32)
# The fraction that is 1: the scale of nearest.
UNCHANGED = 30
REFITS = 2


def search_blocks(values: Float32, absmax: Float32, block: int, grid: FourBitGrid) -> Float32:
    """Scales of blocks of flat values; `absmax` are those of nearest, one a block."""
    best = absmax.copy()
    _search_levels(values, block, grid.midpoints, grid.levels, best)
    return best


def search_groups(values: Float32, scales: Float32, zeros: Int8, grid: Grid) -> Float32:
    """Scales [rows, groups] of values [rows, columns], in the grid's dtype; `scales` and `zeros` are of nearest.

    Zero points stay: to try their neighbours, too, lowers the squared error by a quarter of a per cent.
    """
    best = scales.copy()
    _search_integers(values, zeros, grid.bits, grid.symmetric, DROPPED_BITS[grid.dtype], best)
    return best


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _largest(values: Float32) -> np.float32:
    most = np.float32(0)
    for index in range(values.size):
        most = max(most, abs(values[index]))
    return most


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _search_levels(values: Float32, block: int, midpoints: Float32, levels: Float32, best: Float32) -> None:
    """A growing scale moves a value from level to level towards zero: of each move the candidate is known."""
    m, reach = fifteen(midpoints), max(abs(levels[0]), abs(levels[15]))
    products, squares = np.empty(FRACTIONS.size + 1, np.float64), np.empty(FRACTIONS.size + 1, np.float64)
    for index in range(best.size):
        part = values[index * block : (index + 1) * block]
        largest = _largest(part) / reach
        if largest == 0:
            continue
        products[:], squares[:] = 0, 0
        whole = _add_moves(part, largest, midpoints, levels, products, squares)
        chosen, least = best[index], np.float64(np.inf)
        refit = chosen
        for candidate in range(FRACTIONS.size):
            products[candidate + 1] += products[candidate]
            squares[candidate + 1] += squares[candidate]
        for turn in range(FRACTIONS.size + 1):
            candidate = turn - 1 if turn else UNCHANGED
            scale = largest * FRACTIONS[candidate] if turn else best[index]
            error = _error(whole, products[candidate], squares[candidate], scale)
            if error < least:
                chosen, least, refit = scale, error, np.float32(products[candidate] / squares[candidate])
        for _ in range(REFITS):
            product, square = products_of(part, np.float32(1) / refit, _nearest_level, (m, levels))
            error = _error(whole, product, square, refit)
            if not error < least:
                break
            chosen, least, refit = refit, error, np.float32(product / square)
        best[index] = chosen


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _error(whole: float, product: float, square: float, scale: np.float32) -> float:
    """The squared error from sums over a group: x^2 - 2 s x l + s^2 l^2."""
    return whole - np.float64(scale) * (2 * product - np.float64(scale) * square)


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _add_moves(
    part: Float32, largest: np.float32, midpoints: Float32, levels: Float32, products: Float64, squares: Float64
) -> float:
    """Into [candidates + 1]: what each candidate adds to `sum x l` and `sum l^2` of the one before; gives `sum x^2`."""
    m, count = fifteen(midpoints), FRACTIONS.size
    reciprocal = np.float32(1) / (largest * FRACTIONS[0])
    crossings = np.float64(100) / (np.float64(largest) * midpoints.astype(np.float64))
    whole = np.float64(0)
    for value in part:
        x = np.float64(value)
        whole += x * x
        number = np.int64(nearest_number(value * reciprocal, m))
        held = np.float64(levels[number])
        products[0] += x * held
        squares[0] += held * held
        step = np.int64(-1) if value > 0 else np.int64(1)
        while True:
            place = x * crossings[number - 1 if value > 0 else number]
            if not (place > 0 and place <= count + 69):
                break
            candidate = int(np.ceil(place)) - 70
            number += step
            into = np.float64(levels[number])
            candidate = max(candidate, 0)
            products[candidate] += x * (into - held)
            squares[candidate] += into * into - held * held
            held = into
    return whole


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _nearest_level(place: np.float32, levels: Any) -> np.float32:
    """The nearest of 16 levels, known by the midpoints between them and by themselves."""
    nearest: np.float32 = levels[1][nearest_number(place, levels[0])]
    return nearest


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _search_integers(
    values: Float32, zeros: Int8, bits: int, symmetric: bool, dropped: np.uint32, best: Float32
) -> None:
    """Replace the scales of nearest in `best` [rows, groups]; a group of zeros keeps its own."""
    size = values.shape[1] // max(best.shape[1], 1)
    half = np.float32(1 << (bits - 1))
    candidates = _scratch(FRACTIONS.size + 1)
    for row in range(best.shape[0]):
        for group in range(best.shape[1]):
            part = values[row, group * size : (group + 1) * size]
            largest = _largest(part) / half
            if largest == 0:
                continue
            zero, nearest = zeros[row, group], best[row, group]
            span = (np.float32(-half - zero), np.float32(half - 1 - zero))
            chosen, least = _best_fraction(part, nearest, largest if symmetric else nearest, span, dropped, candidates)
            best[row, group] = round_any(_refit(part, chosen, least, span, dropped), dropped)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _scratch(count: int) -> Any:
    """Of so many candidates the scales, their reciprocals, float32 sums of errors, and float64 totals."""
    singles = np.empty((3, count), np.float32)
    return singles[0], singles[1], singles[2], np.empty(count, np.float64)


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _best_fraction(
    part: Float32, nearest: np.float32, whole: np.float32, span: Any, dropped: np.uint32, scratch: Any
) -> tuple[np.float32, float]:
    """The scale of nearest or the fraction of `whole` with the least error, not yet rounded, and that error."""
    scales, reciprocals, sums, totals = scratch
    scales[0] = nearest
    for number in range(1, scales.size):
        scales[number] = round_any(whole * FRACTIONS[number - 1], dropped)
    for number in range(scales.size):
        reciprocals[number] = np.float32(1) / scales[number]
    totals[:] = 0
    add_errors(part, scales, reciprocals, _nearest_integer, span, sums, totals)
    chosen = 0
    for number in range(1, totals.size):
        if totals[number] < totals[chosen]:
            chosen = number
    return whole * FRACTIONS[chosen - 1] if chosen else nearest, totals[chosen]


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _refit(part: Float32, chosen: np.float32, least: float, span: Any, dropped: np.uint32) -> np.float32:
    """The scale after least-squares refits that lower its error `least`, not yet rounded."""
    for _ in range(REFITS):
        product, square = products_of(part, np.float32(1) / chosen, _nearest_integer, span)
        if square > 0:
            refit = np.float32(product / square)
            error = _error_of_integers(part, round_any(refit, dropped), span)
            if error < least:
                chosen, least = refit, error
    return chosen


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _nearest_integer(place: np.float32, span: Any) -> np.float32:
    """The nearest of the integers from the first of `span` to the last, ties to even."""
    nearest: np.float32 = min(max(np.float32(place + ROUNDER) - ROUNDER, span[0]), span[1])
    return nearest


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _error_of_integers(part: Float32, scale: np.float32, span: Any) -> float:
    """The squared error of one scale, summed as those of all candidates are."""
    reciprocal, total = np.float32(1) / scale, np.float64(0)
    for first in range(0, part.size, PIECE):
        error = np.float32(0)
        for value in part[first : first + PIECE]:
            gap = value - _nearest_integer(value * reciprocal, span) * scale
            error += gap * gap
        total += error
    return total
