"""The scale of each group that leaves the smallest squared error of the nearest levels, without data.

    minimise over s   sum_i (x_i - s * level(x_i / s))^2

Candidates are the 43 fractions 0.70, 0.71 ... 1.12 of the scale that brings the largest magnitude to the outermost
level, then two least-squares refits `s = sum x l / sum l^2` of the best, with `l` the levels it chooses. The scale that
rounding to nearest has comes first and wins ties, so that the error of a group is never above that of nearest. What is
stored of a scale, a 16-bit float, is what is tried. With zero points the fractions are those of the scale of nearest,
and codes count from the zero point. The same search on torch tensors, with weights for the columns, is
`rounding/scale_search.py`.

Errors of all candidates are summed side by side, in the order of the columns, so they do not depend on the width of a
machine's vectors. Scales are positive: that every reader multiplies by a negative one is not proven
(`docs/decisions/023-rounding-without-data.md`). Cost: 43 evaluations a weight in vectors and four by one.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from qlora_export.quant.floats import Float32
from qlora_export.quant.four_bit import FourBitGrid, fifteen, nearest_number
from qlora_export.quant.integers import Grid
from qlora_export.quant.precision import DROPPED_BITS, ROUNDER, round_any
from qlora_export.quant.scales import Int8

Float64 = NDArray[np.float64]
FRACTIONS = np.array([0.70 + 0.01 * step for step in range(43)], np.float32)
# The fraction that is 1: the scale of nearest.
UNCHANGED = 30
REFITS = 2
# So many columns are summed in float32 before the sum joins the float64 total.
PIECE = 128


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
    reach = max(abs(levels[0]), abs(levels[15]))
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
            product, square = _sums(part, refit, midpoints, levels)
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


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _sums(part: Float32, scale: np.float32, midpoints: Float32, levels: Float32) -> tuple[float, float]:
    """`sum x l` and `sum l^2`."""
    m, reciprocal = fifteen(midpoints), np.float32(1) / scale
    product, square = np.float64(0), np.float64(0)
    for value in part:
        held = np.float64(levels[nearest_number(value * reciprocal, m)])
        product += held * np.float64(value)
        square += held * held
    return product, square


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _search_integers(
    values: Float32, zeros: Int8, bits: int, symmetric: bool, dropped: np.uint32, best: Float32
) -> None:
    """Candidates are fractions of the absmax scale, with zero points of that of nearest."""
    rows, groups = best.shape
    size = values.shape[1] // max(groups, 1)
    half = np.float32(1 << (bits - 1))
    raw, scales, reciprocals = np.empty_like(FRACTIONS), np.empty_like(FRACTIONS), np.empty_like(FRACTIONS)
    sums, totals = np.empty_like(FRACTIONS), np.empty(FRACTIONS.size, np.float64)
    for row in range(rows):
        for group in range(groups):
            part = values[row, group * size : (group + 1) * size]
            largest = _largest(part) / half
            if largest == 0:
                continue
            whole = largest if symmetric else best[row, group]
            low = np.float32(-half - zeros[row, group])
            high = np.float32(half - 1 - zeros[row, group])
            for candidate in range(FRACTIONS.size):
                raw[candidate] = whole * FRACTIONS[candidate]
                scales[candidate] = round_any(raw[candidate], dropped)
                reciprocals[candidate] = np.float32(1) / scales[candidate]
            totals[:] = 0
            for first in range(0, part.size, PIECE):
                sums[:] = 0
                for value in part[first : first + PIECE]:
                    for candidate in range(FRACTIONS.size):
                        place = np.float32(value * reciprocals[candidate] + ROUNDER) - ROUNDER
                        gap = value - min(max(place, low), high) * scales[candidate]
                        sums[candidate] += gap * gap
                for candidate in range(FRACTIONS.size):
                    totals[candidate] += sums[candidate]
            chosen = best[row, group]
            least = _error_of_integers(part, chosen, low, high)
            for candidate in range(FRACTIONS.size):
                if totals[candidate] < least:
                    chosen, least = raw[candidate], totals[candidate]
            for _ in range(REFITS):
                above, below = np.float64(0), np.float64(0)
                reciprocal = np.float32(1) / chosen
                for value in part:
                    place = np.float32(value * reciprocal + ROUNDER) - ROUNDER
                    nearest = min(max(place, low), high)
                    above += np.float64(nearest) * np.float64(value)
                    below += np.float64(nearest) * np.float64(nearest)
                if below > 0:
                    refit = np.float32(above / below)
                    error = _error_of_integers(part, round_any(refit, dropped), low, high)
                    if error < least:
                        chosen, least = refit, error
            best[row, group] = round_any(chosen, dropped)


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _error_of_integers(part: Float32, scale: np.float32, low: np.float32, high: np.float32) -> np.float64:
    reciprocal, total = np.float32(1) / scale, np.float64(0)
    for first in range(0, part.size, PIECE):
        error = np.float32(0)
        for value in part[first : first + PIECE]:
            place = np.float32(value * reciprocal + ROUNDER) - ROUNDER
            gap = value - min(max(place, low), high) * scale
            error += gap * gap
        total += error
    return total
