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

from qlora_export.quant.device import kernels
from qlora_export.quant.device.kernels import Values
from qlora_export.quant.floats import Float32

Float64 = NDArray[np.float64]


class LoadedChange(Protocol):
    """A change that can be made to rows of a tensor of `columns` columns; `adds` says that it does not look at them."""

    @property
    def adds(self) -> bool:
        """Whether it adds the same to any rows."""
        ...

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
    adds: bool = True

    def apply(self, values: Values, first_row: int) -> None:
        """Add the products, wherever the values are."""
        last_row = first_row + values.shape[0]
        for piece in self.pieces:
            start = max(first_row, piece.first)
            stop = min(last_row, piece.first + piece.left.shape[0])
            if start < stop:
                if piece.right.shape != (piece.left.shape[1], values.shape[1]):
                    raise ValueError(f"factors of {piece.right.shape[1]} columns meet rows of {values.shape[1]}")
                left = piece.left[start - piece.first : stop - piece.first]
                kernels.add_low_rank(values[start - first_row : stop - first_row], piece.right, left, self.scale)


@dataclass(frozen=True)
class RowMagnitude:
    """Rows of the given lengths, in the direction they have."""

    magnitude: Float32
    adds: bool = False

    def apply(self, values: Float32, first_row: int) -> None:
        """Scale every row to its magnitude."""
        _scale_rows(values, self.magnitude[first_row : first_row + values.shape[0]])


class ColumnMagnitude:
    """Columns of the given lengths; every row must be observed, in any order, before the first is changed."""

    adds = False

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
    adds: bool = False

    def apply(self, values: Float32, first_row: int) -> None:
        """Put the rows in their place."""
        for index, row in self.rows.items():
            if first_row <= index < first_row + values.shape[0]:
                values[index - first_row] = row


@dataclass(frozen=True)
class LoadedVector:
    """A scaled vector."""

    vector: Float32
    adds: bool = True

    def apply(self, values: Float32, first_row: int) -> None:
        """Add it."""
        values += self.vector[first_row : first_row + values.shape[0]].reshape(values.shape)


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
