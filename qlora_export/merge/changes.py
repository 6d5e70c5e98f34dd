"""How an adapter changes one tensor of the base, row block by row block.

    low rank          W + s B A                     W [out, in], A [rank, in], B [out, rank]
    embedding         W + s (B A)^T                 W [vocabulary, width], A [rank, vocabulary], B [width, rank]
    packed experts    W[e] + s B[e] A[e]            A [experts * rank, in], B [out, rank * experts]
    block-diagonal    A or B is a diagonal of blocks, stored without its zeros
    DoRA              m (W + s B A) / |W + s B A|   norms over the inputs of each output (arXiv 2402.09353)
    trained tokens    rows of W replaced
    trained bias      b + s b'

Here are the facts, known from headers; reading the tensors makes them changes of `loaded_changes`. The norms of an
embedding's DoRA run down the rows: they alone need the whole tensor first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qlora_export.merge.loaded_changes import (
    ColumnMagnitude,
    LoadedChange,
    LoadedProduct,
    LoadedRows,
    LoadedVector,
    RowFactors,
    RowMagnitude,
)
from qlora_export.quant.floats import Float32
from qlora_export.sources.architecture import Window
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.reading import SourceFiles


class Change(Protocol):
    """What is known of a change from headers."""

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The adapter's tensors that it is made of."""
        ...

    def load(self, files: SourceFiles) -> LoadedChange:
        """Read them."""
        ...


@dataclass(frozen=True)
class Experts:
    """How factors lie over packed experts: how many, [in, out] instead of [out, in], or the window of one tensor."""

    count: int
    input_major: bool = False
    window: Window | None = None


@dataclass(frozen=True)
class LowRank:
    """The product of two factors, or its transpose; `blocks` lie on the diagonals of A and B, 1 is a whole matrix."""

    a: StoredTensor
    b: StoredTensor
    scale: float
    blocks: tuple[int, int] = (1, 1)
    transposed: bool = False
    experts: Experts | None = None

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """A and B."""
        return (self.a, self.b)

    def load(self, files: SourceFiles) -> LoadedProduct:
        """The factors in float32, cut into the pieces that rows of the tensor meet."""
        scale = np.float32(self.scale)
        if self.experts is not None:
            a, b = files.shared_values(self.a), files.shared_values(self.b)
            return LoadedProduct(tuple(_expert_pieces(a, b, self.experts)), scale)
        a = _diagonal(files.values(self.a), self.blocks[0])
        b = _diagonal(files.values(self.b), self.blocks[1])
        if self.transposed:
            return LoadedProduct((_piece(0, a.T, b.T),), scale)
        return LoadedProduct((_piece(0, b, a),), scale)


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


class Changes:
    """All changes of one tensor, made in order."""

    def __init__(self, changes: Sequence[Change], files: SourceFiles, columns: int) -> None:
        self._columns = columns
        self._loaded = [change.load(files) for change in changes]
        self._norms = [change for change in self._loaded if isinstance(change, ColumnMagnitude)]

    @property
    def adds(self) -> bool:
        """Whether the same is added to any rows."""
        return all(change.adds for change in self._loaded)

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


def _piece(first: int, left: Float32, right: Float32) -> RowFactors:
    return RowFactors(first, np.ascontiguousarray(left), np.ascontiguousarray(right))


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


def _expert_pieces(a: Float32, b: Float32, experts: Experts) -> list[RowFactors]:
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
