from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import numpy as np
import pytest

from qlora_export.drift.comparison import speed
from qlora_export.drift.comparison.rows import Comparison
from qlora_export.drift.comparison.speed import DECODED_TOKENS, PROMPT_TOKENS, REPEATS, speed_of
from qlora_export.drift.tokens import Protocol, TokenSet, Window
from qlora_export.runtimes.base import GreedySession
from qlora_export.runtimes.loading import load_model
from qlora_export.runtimes.session import ModelSession
from qlora_export.types import Float32

LONGEST = tuple(range(40))
WINDOWS = tuple(Window(ids, (1,), "", block) for block, ids in enumerate([(1, 2), LONGEST, (1, 2, 3)]))
TOKENS = TokenSet(WINDOWS, Protocol("test", "as the test says", len(LONGEST)))
LEAST_SECONDS = 0.1


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "LEAST_SECONDS", LEAST_SECONDS)


class Prefilling:
    """Takes 20 ms once, and 5 ms from then on."""

    def __init__(self) -> None:
        self.asked: list[Sequence[int]] = []

    def log_probabilities(self, tokens: Sequence[int]) -> Float32:
        time.sleep(0.005 if self.asked else 0.02)
        self.asked.append(tokens)
        return np.zeros((len(tokens), 2), np.float32)


class Decoding(Prefilling):
    """Takes 10 ms for a prompt."""

    @property
    def ends(self) -> frozenset[int]:
        return frozenset()

    def greedy(self, tokens: Sequence[int], count: int, ends: Collection[int] = ()) -> list[int]:
        time.sleep(0.01)
        self.asked.append(tokens)
        return [0] * count


@pytest.mark.usefixtures("hasty")
def test_the_longest_window_is_repeated_and_the_least_time_counts() -> None:
    session = Prefilling()
    found = speed_of(session, TOKENS)
    assert session.asked == [LONGEST] * len(session.asked)
    assert REPEATS < len(session.asked) <= LEAST_SECONDS / 0.005
    assert 40 / 0.01 < found.prefill <= 40 / 0.005
    assert found.decode is None


@pytest.mark.usefixtures("hasty")
def test_decoding_is_timed_after_a_short_prompt() -> None:
    session = Decoding()
    found = speed_of(session, TOKENS)
    assert set(session.asked) == {LONGEST, LONGEST[:PROMPT_TOKENS]}
    assert found.decode is not None
    assert DECODED_TOKENS / 0.02 < found.decode <= DECODED_TOKENS / 0.01


def test_greedy_decoding_takes_the_most_likely_token_each_time(compared: Comparison) -> None:
    folder = next(row.measured.entry.artifact.path for row in compared.rows if row.measured and row.name == "fp32")
    session = ModelSession(load_model(folder))
    assert isinstance(session, GreedySession)
    tokens = [5, 6, 7]
    found = session.greedy(tokens, 4)
    for token in found:
        assert token == session.log_probabilities(tokens)[-1].argmax()
        tokens.append(token)


def test_every_row_of_transformers_is_timed_against_fp32(compared: Comparison) -> None:
    rows = {row.name: row.measured for row in compared.rows if row.measured is not None}
    base = rows["fp32"].speed
    assert (rows["fp32"].prefill_ratio, rows["fp32"].decode_ratio) == (1, 1)
    for found in rows.values():
        assert found.prefill_ratio == pytest.approx(found.speed.prefill / base.prefill)
        assert found.decode_ratio
        assert found.speed.decode
