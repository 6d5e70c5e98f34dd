"""Changes whose tensors were read: the numerics, on rows [rows, columns] in place.

Every sum runs in a fixed order without fused multiply-adds, so bytes depend neither on how rows are cut nor on the
machine. Norms are summed in float64. Cost: 2 * rank operations a weight; the right factor stays in the cache.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

import numba
import numpy as np
from numpy.typing import NDArray

from qlora_export.quant.floats import Float32

Float64 = NDArray[np.float64]
# Columns whose factors, sums and values stay in the first-level cache together.
TILE_COLUMNS = 512


class LoadedChange(Protocol):
    """A change that can be made to rows of a tensor of `columns` columns."""

    def apply(self, values: Float32, first_row: int) -> None:
        """Change rows [rows, columns] from `first_row` on, in place."""
        ...


@dataclass(frozen=True)
class RowFactors:
    """Rows from `first` on get `left @ right`: left [rows, rank], right [rank, columns]."""

    first: int
    left: Float32
    right: Float32


@dataclass(frozen=True)
class LoadedProduct:
    """`scale * left @ right` for each piece of rows."""

    pieces: tuple[RowFactors, ...]
    scale: np.float32

    def apply(self, values: Float32, first_row: int) -> None:
        """Add the products."""
        last_row = first_row + values.shape[0]
        for piece in self.pieces:
            start = max(first_row, piece.first)
            stop = min(last_row, piece.first + piece.left.shape[0])
            if start < stop:
                if piece.right.shape != (piece.left.shape[1], values.shape[1]):
                    raise ValueError(f"factors of {piece.right.shape[1]} columns meet rows of {values.shape[1]}")
                left = piece.left[start - piece.first : stop - piece.first]
                _add_low_rank(values[start - first_row : stop - first_row], piece.right, left, self.scale)


@dataclass(frozen=True)
class RowMagnitude:
    """Rows of the given lengths, in the direction they have."""

    magnitude: Float32

    def apply(self, values: Float32, first_row: int) -> None:
        """Scale every row to its magnitude."""
        _scale_rows(values, self.magnitude[first_row : first_row + values.shape[0]])


class ColumnMagnitude:
    """Columns of the given lengths; every row must be observed, in any order, before the first is changed."""

    def __init__(self, magnitude: Float32) -> None:
        self._magnitude = magnitude
        self._squares: Float64 = np.zeros(magnitude.size, np.float64)
        self._factors = magnitude
        self._waiting: dict[int, Float32] = {}
        self._next = 0
        self._lock = threading.Lock()

    def observe(self, values: Float32, first_row: int) -> None:
        """Take note of rows; early ones wait for their turn, so that the sums do not depend on who was first."""
        with self._lock:
            self._waiting[first_row] = values
            while (rows := self._waiting.pop(self._next, None)) is not None:
                _add_squares(rows, self._squares)
                self._next += rows.shape[0]

    def settle(self) -> None:
        """All rows were observed."""
        self._factors = (self._magnitude / np.sqrt(self._squares)).astype(np.float32)

    def apply(self, values: Float32, first_row: int) -> None:
        """Scale every column to its magnitude."""
        values *= self._factors


@dataclass(frozen=True)
class LoadedRows:
    """Rows by their index."""

    rows: dict[int, Float32]

    def apply(self, values: Float32, first_row: int) -> None:
        """Put the rows in their place."""
        for index, row in self.rows.items():
            if first_row <= index < first_row + values.shape[0]:
                values[index - first_row] = row


@dataclass(frozen=True)
class LoadedVector:
    """A scaled vector."""

    vector: Float32

    def apply(self, values: Float32, first_row: int) -> None:
        """Add it."""
        values += self.vector[first_row : first_row + values.shape[0]].reshape(values.shape)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _add_low_rank(values: Float32, a: Float32, b: Float32, scale: np.float32) -> None:
    """Two rows and four components at a time, so that a sum stays in a register for a while.

    What is missing at the end counts as a component of weight zero, or as the same row again.
    """
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


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _scale_rows(values: Float32, magnitude: Float32) -> None:
    rows, columns = values.shape
    for row in range(rows):
        squares = np.float64(0)
        for column in range(columns):
            squares += np.float64(values[row, column]) * np.float64(values[row, column])
        factor = np.float32(np.float64(magnitude[row]) / np.sqrt(squares))
        for column in range(columns):
            values[row, column] *= factor


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _add_squares(values: Float32, squares: Float64) -> None:
    rows, columns = values.shape
    for row in range(rows):
        for column in range(columns):
            squares[column] += np.float64(values[row, column]) * np.float64(values[row, column])
