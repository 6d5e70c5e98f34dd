from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from qlora_export.comparison.rows import Comparison
from qlora_export.comparison.speed import DECODED_TOKENS, PROMPTS, GreedySession, TimedSession, Times, speed_of, timed
from qlora_export.contracts import Float32
from qlora_export.drift.tokens import TokenSet, Window
from qlora_export.runtimes.loading import ModelSession, load_causal_lm


class Counting:
    """Answers at once, and cannot decode."""

    def log_probabilities(self, tokens: Sequence[int]) -> Float32:
        return np.zeros((len(tokens), 2), np.float32)


def test_ratios_are_paired_by_window() -> None:
    own, base = Times((10, 40, 10), (1, 8, 1), (2, 2)), Times((10, 40, 10), (2, 2, 2), (1, 1))
    found = speed_of(own, base)
    assert (found.prefill_tokens_per_second, found.prefill_ratio) == (10, 2)
    assert (found.decode_tokens_per_second, found.decode_ratio) == (DECODED_TOKENS / 2, 0.5)


def test_what_was_not_timed_has_no_number() -> None:
    found = speed_of(Times((10,), (2,), ()), None)
    assert (found.prefill_tokens_per_second, found.prefill_ratio) == (5, None)
    assert (found.decode_tokens_per_second, found.decode_ratio) == (None, None)
    assert speed_of(Times((10,), (2,), ()), Times((10,), (2,), (1,))).decode_ratio is None


def test_a_session_is_timed_window_by_window() -> None:
    tokens = TokenSet(tuple(Window((1,) * (n + 2), (1,)) for n in range(3)), "test")
    session = TimedSession(Counting())
    for window in tokens.windows:
        assert session.log_probabilities(window.tokens).shape == (len(window.tokens), 2)
    found = timed(session, tokens)
    assert found.tokens == (2, 3, 4)
    assert len(found.prefill) == 3
    assert min(found.prefill) > 0
    assert found.decode == ()


def test_greedy_decoding_takes_the_most_likely_token_each_time(compared: Comparison) -> None:
    folder = next(row.measured.entry.artifact.path for row in compared.rows if row.measured and row.name == "fp32")
    session = ModelSession(load_causal_lm(folder))
    assert isinstance(session, GreedySession)
    tokens = [5, 6, 7]
    found = session.greedy(tokens, 4)
    for token in found:
        assert token == session.log_probabilities(tokens)[-1].argmax()
        tokens.append(token)


def test_every_row_of_transformers_was_timed(compared: Comparison) -> None:
    for row in compared.rows:
        if row.measured is not None:
            speed = row.measured.speed
            assert speed.prefill_tokens_per_second > 0
            assert speed.decode_tokens_per_second
            assert speed.prefill_ratio
    baseline = next(row.measured.speed for row in compared.rows if row.measured and row.name == "fp32")
    assert (baseline.prefill_ratio, baseline.decode_ratio) == (pytest.approx(1), pytest.approx(1))
    assert len(compared.tokens.windows) >= PROMPTS
