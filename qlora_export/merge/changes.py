"""How an adapter changes one tensor of the base, row block by row block.

    low rank          W + s B A                     W [out, in], A [rank, in], B [out, rank]
    embedding         W + s (B A)^T                 W [vocabulary, width], A [rank, vocabulary], B [width, rank]
    packed experts    W[e] + s B[e] A[e]            A [experts * rank, in], B [out, rank * experts]
    block-diagonal    A or B is a diagonal of blocks, stored without its zeros
    DoRA              m (W + s B A) / |W + s B A|   norms over the inputs of each output (arXiv 2402.09353)
    trained tokens    rows of W replaced
    trained bias      b + s b'

Every sum runs in a fixed order without fused multiply-adds, so bytes depend neither on how rows are cut nor on the
machine. Cost: 2 * rank operations a weight; A stays in the cache. The norms of an embedding's DoRA run down the rows:
they alone need the whole tensor first.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numba
import numpy as np
from numpy.typing import NDArray

from qlora_export.quant.floats import Float32
from qlora_export.sources.architecture import Window
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.reading import SourceFiles

Float64 = NDArray[np.float64]


class Change(Protocol):
    """What is known of a change from headers."""

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The adapter's tensors that it is made of."""
        ...

    def load(self, files: SourceFiles) -> LoadedChange:
        """Read them."""
        ...


class LoadedChange(Protocol):
    """A change that can be made to rows of a tensor of `columns` columns."""

    def apply(self, values: Float32, first_row: int) -> None:
        """Change rows [rows, columns] from `first_row` on, in place."""
        ...


@dataclass(frozen=True)
class Experts:
    """How factors lie over packed experts: how many, [in, out] instead of [out, in], or the window of one tensor."""

    count: int
    input_major: bool = False
    window: Window | None = None


@dataclass(frozen=True)
class LowRank:
    """The product of two factors; `blocks` are how many the diagonals of A and B have, 1 for a whole matrix."""

    a: StoredTensor
    b: StoredTensor
    scale: float
    blocks: tuple[int, int] = (1, 1)
    embedding: bool = False
    experts: Experts | None = None

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """A and B."""
        return (self.a, self.b)

    def load(self, files: SourceFiles) -> LoadedProduct:
        """The factors in float32, cut into the pieces that rows of the tensor meet."""
        a = _diagonal(files.values(self.a), self.blocks[0])
        b = _diagonal(files.values(self.b), self.blocks[1])
        scale = np.float32(self.scale)
        if self.embedding:
            return LoadedProduct((_piece(0, a.T, b.T),), scale)
        if self.experts is None:
            return LoadedProduct((_piece(0, b, a),), scale)
        return LoadedProduct(tuple(_expert_pieces(a, b, self.experts)), scale)


@dataclass(frozen=True)
class Magnitude:
    """DoRA's magnitude, of rows, or for an embedding of columns."""

    magnitude: StoredTensor
    columns: bool = False

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The magnitude."""
        return (self.magnitude,)

    def load(self, files: SourceFiles) -> LoadedChange:
        """The magnitudes in float32."""
        values = files.values(self.magnitude).reshape(-1)
        return ColumnMagnitude(values) if self.columns else RowMagnitude(values)


@dataclass(frozen=True)
class ReplacedRows:
    """Rows that were trained whole, at their indices."""

    rows: StoredTensor
    indices: tuple[int, ...]

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The rows."""
        return (self.rows,)

    def load(self, files: SourceFiles) -> LoadedChange:
        """The rows in float32."""
        return LoadedRows(dict(zip(self.indices, files.values(self.rows), strict=True)))


@dataclass(frozen=True)
class AddedVector:
    """A vector that is added with a scale: the trained bias of B."""

    vector: StoredTensor
    scale: float

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The vector."""
        return (self.vector,)

    def load(self, files: SourceFiles) -> LoadedChange:
        """The scaled vector in float32."""
        return LoadedVector(files.values(self.vector).reshape(-1) * np.float32(self.scale))


@dataclass(frozen=True)
class Piece:
    """Rows from `first` on get `left @ right`: left [rows, rank], right [rank, columns]."""

    first: int
    left: Float32
    right: Float32


@dataclass(frozen=True)
class LoadedProduct:
    """`scale * left @ right` for each piece of rows."""

    pieces: tuple[Piece, ...]
    scale: np.float32

    def apply(self, values: Float32, first_row: int) -> None:
        """Add the products."""
        last_row = first_row + values.shape[0]
        for piece in self.pieces:
            start = max(first_row, piece.first)
            stop = min(last_row, piece.first + piece.left.shape[0])
            if start < stop:
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


class Changes:
    """All changes of one tensor, made in order."""

    def __init__(self, changes: Sequence[Change], files: SourceFiles, columns: int) -> None:
        self._columns = columns
        self._loaded = [change.load(files) for change in changes]
        self._norms = [change for change in self._loaded if isinstance(change, ColumnMagnitude)]

    @property
    def observes(self) -> bool:
        """Whether all rows must be observed first."""
        return bool(self._norms)

    def observe(self, values: Float32, first_row: int) -> None:
        """First pass: flat rows of the base, which stay as they are."""
        rows = values.copy().reshape(-1, self._columns)
        for change in self._loaded:
            if isinstance(change, ColumnMagnitude):
                change.observe(rows, first_row)
                return
            change.apply(rows, first_row)

    def settle(self) -> None:
        """End of the first pass."""
        for norms in self._norms:
            norms.settle()

    def apply(self, values: Float32, first_row: int) -> None:
        """Change flat rows in place."""
        rows = values.reshape(-1, self._columns)
        for change in self._loaded:
            change.apply(rows, first_row)


def _piece(first: int, left: Float32, right: Float32) -> Piece:
    return Piece(first, np.ascontiguousarray(left), np.ascontiguousarray(right))


def _diagonal(stored: Float32, blocks: int) -> Float32:
    """The whole matrix of a block-diagonal one that is stored as its blocks, one below the other."""
    if blocks == 1:
        return stored
    rows, columns = stored.shape[0] // blocks, stored.shape[1]
    whole = np.zeros((stored.shape[0], columns * blocks), np.float32)
    for block in range(blocks):
        place = slice(block * rows, (block + 1) * rows)
        whole[place, block * columns : (block + 1) * columns] = stored[place]
    return whole


def _expert_pieces(a: Float32, b: Float32, experts: Experts) -> list[Piece]:
    """The factors of every expert, or of the window; in A the experts lie outside the rank, in B inside."""
    per_expert_a = a.reshape(experts.count, -1, a.shape[1])
    per_expert_b = b.reshape(b.shape[0], -1, experts.count)
    if experts.window is not None:
        window = experts.window
        left = per_expert_b[window.first : window.first + window.count, :, window.expert]
        return [_piece(0, left, per_expert_a[window.expert])]
    pieces = []
    for expert in range(experts.count):
        left, right = per_expert_b[:, :, expert], per_expert_a[expert]
        if experts.input_major:
            left, right = right.T, left.T
        pieces.append(_piece(expert * left.shape[0], left, right))
    return pieces


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _add_low_rank(values: Float32, a: Float32, b: Float32, scale: np.float32) -> None:
    rows, columns = values.shape
    rank = a.shape[0]
    sums = np.empty(columns, np.float32)
    for row in range(rows):
        for column in range(columns):
            sums[column] = np.float32(0)
        for component in range(rank):
            weight = b[row, component]
            for column in range(columns):
                sums[column] += weight * a[component, column]
        for column in range(columns):
            values[row, column] += scale * sums[column]


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
