"""The product of two thin factors, added to rows in a fixed order.

    values += scale * (b @ a),   each sum over the components one by one, no fused multiply-adds

so that bytes depend neither on how rows are cut nor on the machine. Two rows and four components are taken at a time,
for a sum to stay in a register that long; what is missing at the end counts as a component of weight zero, or as the
same row again. Cost: 2 * rank operations a weight, from the first-level cache.
"""

from __future__ import annotations

import numba
import numpy as np

from qlora_export.quant.floats import Float32

# Columns whose factors, sums and values stay in the first-level cache together.
TILE_COLUMNS = 512


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def add_low_rank(values: Float32, a: Float32, b: Float32, scale: np.float32) -> None:
    """Add `scale * b @ a` to values [rows, columns] in place: a [rank, columns], b [rows, rank]."""
    rows, columns = values.shape
    rank = a.shape[0]
    scratch = np.empty((2, TILE_COLUMNS), np.float32)
    for first in range(0, columns, TILE_COLUMNS):
        last = min(first + TILE_COLUMNS, columns)
        upper, lower = scratch[0][: last - first], scratch[1][: last - first]
        for row in range(0, rows, 2):
            below = min(row + 1, rows - 1)
            scratch[:] = np.float32(0)
            for component in range(0, rank, 4):
                a0, a1 = _factor(a, component)[first:last], _factor(a, component + 1)[first:last]
                a2, a3 = _factor(a, component + 2)[first:last], _factor(a, component + 3)[first:last]
                u0, v0 = b[row, component], b[below, component]
                u1, v1 = _weight(b, row, component + 1), _weight(b, below, component + 1)
                u2, v2 = _weight(b, row, component + 2), _weight(b, below, component + 2)
                u3, v3 = _weight(b, row, component + 3), _weight(b, below, component + 3)
                for column in range(upper.size):
                    x0, x1, x2, x3 = a0[column], a1[column], a2[column], a3[column]
                    upper[column] = (((upper[column] + u0 * x0) + u1 * x1) + u2 * x2) + u3 * x3
                    lower[column] = (((lower[column] + v0 * x0) + v1 * x1) + v2 * x2) + v3 * x3
            _add_scaled(values[row][first:last], upper, scale)
            if below > row:
                _add_scaled(values[below][first:last], lower, scale)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _factor(a: Float32, component: int) -> Float32:
    row: Float32 = a[min(component, a.shape[0] - 1)]
    return row


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _weight(b: Float32, row: int, component: int) -> np.float32:
    weight: np.float32 = b[row, component] if component < b.shape[1] else np.float32(0)
    return weight


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _add_scaled(values: Float32, sums: Float32, scale: np.float32) -> None:
    for column in range(values.size):
        values[column] += scale * sums[column]
