from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qlora_export.merge.loaded_changes import (
    ColumnMagnitude,
    LoadedProduct,
    LoadedRows,
    LoadedVector,
    RowFactors,
    RowMagnitude,
)
from tests.helpers.values import random_values

sizes = st.integers(1, 40)


def applied(change: Any, values: np.ndarray[Any, np.dtype[np.float32]], cut: int) -> bytes:
    """The bytes after a change in two pieces."""
    pieces = values[:cut].copy(), values[cut:].copy()
    change.apply(pieces[0], 0)
    change.apply(pieces[1], cut)
    return b"".join(piece.tobytes() for piece in pieces)


@given(rows=sizes, columns=sizes, rank=st.integers(1, 9), cut=st.integers(0, 40), pieces=st.integers(1, 4))
def test_changes_do_not_depend_on_how_rows_are_cut(rows: int, columns: int, rank: int, cut: int, pieces: int) -> None:
    left, right = random_values(rows, rank, seed=1), random_values(pieces, rank, columns)
    bounds = np.linspace(0, rows, pieces + 1).astype(int)
    product = LoadedProduct(
        tuple(RowFactors(int(bounds[i]), left[bounds[i] : bounds[i + 1]], right[i]) for i in range(pieces)),
        np.float32(1.5),
    )
    values = random_values(rows, columns, seed=2)
    changes: list[Any] = [
        product,
        RowMagnitude(random_values(rows, seed=3)),
        LoadedRows({0: random_values(columns, seed=4), rows - 1: random_values(columns, seed=5)}),
    ]
    for change in changes:
        whole = values.copy()
        change.apply(whole, 0)
        assert applied(change, values, min(cut, rows)) == whole.tobytes()
    whole = values.copy()
    product.apply(whole, 0)
    expected = np.concatenate(
        [left[bounds[i] : bounds[i + 1]].astype(np.float64) @ right[i].astype(np.float64) for i in range(pieces)]
    )
    np.testing.assert_allclose(whole, values + 1.5 * expected, rtol=1e-6, atol=1e-8)


@given(rows=st.integers(1, 30), columns=sizes, order=st.randoms(use_true_random=False))
def test_column_norms_do_not_depend_on_who_was_first(rows: int, columns: int, order: Any) -> None:
    values, magnitude = random_values(rows, columns), random_values(columns, seed=1)
    found = set()
    for height in (1, 2, 7, rows):
        starts = list(range(0, rows, height))
        order.shuffle(starts)
        change = ColumnMagnitude(magnitude)
        for start in starts:
            change.observe(values[start : start + height].copy(), start)
        change.settle()
        whole = values.copy()
        change.apply(whole, 0)
        found.add(whole.tobytes())
    assert len(found) == 1
    norms = np.linalg.norm(values.astype(np.float64), axis=0)
    np.testing.assert_allclose(whole, values * (magnitude / norms).astype(np.float32), rtol=1e-6)


def test_a_vector_is_added_as_a_column() -> None:
    values = np.zeros((4, 1), np.float32)
    LoadedVector(np.arange(10, dtype=np.float32)).apply(values, 3)
    assert values.ravel().tolist() == [3, 4, 5, 6]
