"""Windows in batches: all of them, in order, within the budget, and halved where memory is short."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_export.drift.batches import batched_rows, batches_of
from qlora_export.drift.tokens import Window
from qlora_export.errors import EnvironmentProblem
from qlora_export.runtimes.loading import load_model
from qlora_export.runtimes.session import ModelSession
from qlora_export.types import Float32

LENGTHS = st.lists(st.integers(1, 40), max_size=30)


def windows_of(lengths: Sequence[int]) -> list[Window]:
    return [Window(tuple(range(length)), tuple(range(1, length)), "", n) for n, length in enumerate(lengths)]


@given(lengths=LENGTHS, budget=st.integers(1, 100))
def test_every_window_once_within_the_budget(lengths: list[int], budget: int) -> None:
    windows = windows_of(lengths)
    batches = list(batches_of(windows, budget))
    assert [window for batch in batches for window in batch] == windows
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(window.tokens) for window in batch) <= budget


def test_a_batch_gives_what_single_windows_give(pico_base: Path) -> None:
    session = ModelSession(load_model(pico_base, dtype=torch.float32))
    windows = windows_of([12, 3, 30, 7])
    for window, rows in zip(windows, batched_rows(session, windows), strict=True):
        alone = session.log_probabilities(window.tokens)[np.array(window.scored) - 1]
        assert rows.shape == (len(window.scored), alone.shape[1])
        assert np.abs(rows - alone).max() < 1e-5


class Small:
    """Takes so many tokens at once."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.asked: list[int] = []

    def log_probabilities(self, tokens: Sequence[int]) -> Float32:
        raise NotImplementedError

    def rows_at(self, windows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> list[Float32]:
        size = len(windows) * max(map(len, windows))
        self.asked.append(size)
        if size > self.most:
            raise MemoryError("none left")
        return [np.full((len(at), 2), len(window), np.float32) for window, at in zip(windows, places, strict=True)]


def test_without_memory_batches_are_halved_and_a_single_window_is_an_error() -> None:
    session = Small(20)
    windows = windows_of([10] * 8)
    assert [len(rows) for rows in batched_rows(session, windows)] == [9] * 8
    assert session.asked == [72, 36, 18, 18, 36, 18, 18]
    with pytest.raises(EnvironmentProblem, match="no memory for a window of 10 tokens: none left"):
        list(batched_rows(Small(8), windows))


def test_memory_that_torch_does_not_get_is_a_memory_error(pico_base: Path) -> None:
    session = ModelSession(load_model(pico_base, dtype=torch.float32))
    session._model.forward = lambda **inputs: torch.empty(1 << 60)
    with pytest.raises(MemoryError, match="can't allocate memory"):
        session.rows_at([[1, 2]], [[0]])
