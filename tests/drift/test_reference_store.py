"""References on disk: found again by what decides them, whole or not at all, within a limit."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_export.drift.reference_store import (
    FACTS,
    ROWS,
    Reference,
    ReferenceStore,
    columns_of,
    kept_references,
    measurement_in,
    open_reference,
)
from qlora_export.drift.results import Measurement
from qlora_export.drift.tokens import Protocol, TokenSet, Window
from qlora_export.errors import InputError

VOCABULARY = 5
WINDOWS = (Window((1, 2, 3), (1, 2), "line 1", 0), Window((4, 3), (1,), "line 2", 1))
TOKENS = TokenSet(WINDOWS, Protocol("test", "as the test says", 3))
ROWS_OF_WINDOWS = [np.arange(10, dtype=np.float32).reshape(2, 5), np.full((1, 5), 7, np.float32)]
KEY = {"base": "a"}


def measured(name: str = "tuned") -> Measurement:
    kl, top1 = np.array([0.0, 0.5, 1.5]), np.array([3, 1, 4])
    return Measurement(name, "transformers", np.array([1.0, 2, 3]), top1, kl, np.array([0.5, 0.25, 1], np.float32), 2)


def fill(reference: Reference) -> None:
    for number, rows in enumerate(ROWS_OF_WINDOWS):
        reference.rows.put(number, rows)
    reference.keep(columns_of({"tuned": measured()}))


def keep(store: ReferenceStore, key: dict[str, Any] = KEY) -> Path:
    before = set(kept_references(store.out))
    with open_reference(store, key, TOKENS) as reference:
        assert not reference.known
        fill(reference)
    (folder,) = set(kept_references(store.out)) - before
    return folder


def test_what_was_kept_is_found_and_nothing_is_lost(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, 100_000)
    folder = keep(store)
    with open_reference(store, KEY, TOKENS) as again:
        assert again.known
        for number, rows in enumerate(ROWS_OF_WINDOWS):
            assert np.array_equal(again.rows.get(number), rows)
        found = measurement_in(again.columns, "tuned")
    assert found is not None
    assert (found.name, found.runtime, found.nonfinite) == ("tuned", "transformers", 2)
    for column in ("nll", "top1", "kl", "confidence"):
        assert np.array_equal(getattr(found, column), getattr(measured(), column))
    assert measurement_in(again.columns, "base") is None
    assert sorted(path.name for path in folder.iterdir()) == ["measured.npz", "reference.json", "rows.f32"]


@pytest.mark.parametrize("key", [{"base": "b"}, {"base": "a", "adapter": "x"}])
def test_another_key_is_another_reference(tmp_path: Path, key: dict[str, Any]) -> None:
    store = ReferenceStore(tmp_path, 100_000)
    keep(store)
    with open_reference(store, key, TOKENS) as reference:
        assert not reference.known
    other = TokenSet(WINDOWS[:1], TOKENS.protocol)
    with open_reference(store, KEY, other) as reference:
        assert not reference.known
    assert len(kept_references(tmp_path)) == 1, "what was not finished is gone"


def test_a_damaged_row_is_named_and_not_used(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, 100_000)
    path = keep(store) / ROWS
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with open_reference(store, KEY, TOKENS) as reference:
        reference.rows.get(0)
        with pytest.raises(InputError, match="window 2 is damaged"):
            reference.rows.get(1)


@pytest.mark.parametrize("left", [0, 11])
@pytest.mark.parametrize("cut", [ROWS, FACTS, "measured.npz"])
def test_what_is_cut_short_is_measured_again(tmp_path: Path, cut: str, left: int) -> None:
    store = ReferenceStore(tmp_path, 100_000)
    path = keep(store) / cut
    path.write_bytes(path.read_bytes()[:left])
    with open_reference(store, KEY, TOKENS) as reference:
        assert not reference.known
        fill(reference)
    with open_reference(store, KEY, TOKENS) as reference:
        assert reference.known


def test_the_least_used_make_room_and_what_is_too_large_is_not_kept(tmp_path: Path) -> None:
    sizes = [sum(file.stat().st_size for file in keep(ReferenceStore(tmp_path, 100_000)).iterdir())]
    store = ReferenceStore(tmp_path, 2 * sizes[0] + 100)
    second = keep(store, {"base": "b"})
    first = next(path for path in kept_references(tmp_path) if path != second)
    os.utime(second / FACTS, ns=(0, 0))
    third = keep(store, {"base": "c"})
    assert kept_references(tmp_path) == sorted([first, third])
    with open_reference(ReferenceStore(tmp_path, 59), {"base": "d"}, TOKENS) as reference:
        fill(reference)
        assert np.array_equal(reference.rows.get(1), ROWS_OF_WINDOWS[1]), "this run still has it"
    assert kept_references(tmp_path) == [], "what was there exceeds the limit, too"


def test_an_error_while_it_is_filled_leaves_nothing(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, 100_000)
    with pytest.raises(RuntimeError, match="killed"), open_reference(store, KEY, TOKENS) as reference:
        reference.rows.put(0, ROWS_OF_WINDOWS[0])
        raise RuntimeError("killed")
    assert kept_references(tmp_path) == []


def test_what_a_dead_run_left_is_taken_over(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, 100_000)
    folder = keep(store)
    partial = folder.rename(folder.with_suffix(".partial"))
    (partial / FACTS).unlink()
    assert kept_references(tmp_path) == [partial]
    keep(store)
    assert kept_references(tmp_path) == [partial, folder] or kept_references(tmp_path) == [folder]
    assert folder.is_dir()


def test_the_end_of_a_run_leaves_what_another_fills_by_now(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, 100_000)
    with ExitStack() as first, ExitStack() as second:
        fill(first.enter_context(open_reference(store, KEY, TOKENS)))
        (folder,) = kept_references(tmp_path)
        shutil.rmtree(folder)
        again = second.enter_context(open_reference(store, KEY, TOKENS))
        first.close()
        fill(again)
    assert kept_references(tmp_path) == [folder]


def test_two_runs_at_once_do_not_meet(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, 100_000)
    with open_reference(store, KEY, TOKENS) as first, open_reference(store, KEY, TOKENS) as second:
        fill(second)
        assert not any(path.suffix != ".partial" for path in kept_references(tmp_path)), "the first one writes there"
        fill(first)
        assert np.array_equal(second.rows.get(0), ROWS_OF_WINDOWS[0])
    with open_reference(store, KEY, TOKENS) as again:
        assert again.known
