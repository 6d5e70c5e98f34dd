from __future__ import annotations

import numpy as np
import pytest

from qlora_export.drift.results import Measurement
from qlora_export.drift.statistics import Bootstrap, compare
from qlora_export.drift.tokens import Protocol, TokenSet, Window


def tokens(windows: int, length: int) -> TokenSet:
    ids, scored = tuple(range(length + 1)), tuple(range(1, length + 1))
    made = tuple(Window(ids, scored, f"window {number}", number) for number in range(windows))
    return TokenSet(made, Protocol("test", "as the test says", length + 1))


def measurement(nll: np.ndarray, top1: np.ndarray | None = None, kl: np.ndarray | None = None) -> Measurement:
    count = len(nll)
    said = np.zeros(count, np.int64) if top1 is None else top1
    return Measurement("m", "r", nll, said, np.zeros(count) if kl is None else kl, np.ones(count, np.float32))


def test_known_numbers() -> None:
    reference = measurement(np.array([1.0, 3.0]), np.array([5, 6]))
    base = measurement(np.array([5.0, 7.0]))
    candidate = measurement(np.array([1.5, 3.5]), np.array([5, 9]), np.array([0.1, 0.3]))
    drift = compare(candidate, reference, base, tokens(2, 1))
    assert drift.perplexity == pytest.approx(np.exp(2.5))
    assert drift.perplexity_reference == pytest.approx(np.exp(2.0))
    assert drift.ln_ppl_ratio == pytest.approx(0.5)
    assert drift.ln_ppl_ratio_stderr == pytest.approx(0)
    assert drift.mean_kl == pytest.approx(0.2)
    assert drift.same_top1 == 0.5
    assert drift.gain_kept == pytest.approx((6 - 2.5) / (6 - 2))


def test_the_bootstrap_error_is_that_of_a_mean_of_windows() -> None:
    rng = np.random.default_rng(0)
    per_window = np.repeat(rng.normal(size=400), 10)
    error = Bootstrap(tokens(400, 10)).stderr(lambda mean: mean, per_window)
    assert error == pytest.approx(1 / np.sqrt(400), rel=0.15)


def test_pairing_makes_the_ratio_far_more_certain_than_the_perplexities() -> None:
    rng = np.random.default_rng(1)
    reference = rng.gamma(2, 1, 4000)
    drift = compare(
        measurement(reference + rng.normal(0, 0.01, 4000)),
        measurement(reference),
        measurement(reference + 1),
        tokens(100, 40),
    )
    assert drift.ln_ppl_ratio_stderr < drift.perplexity_stderr / drift.perplexity / 20


def test_without_a_gain_none_can_be_kept() -> None:
    values = np.ones(6)
    drift = compare(measurement(values), measurement(values), measurement(values), tokens(3, 2))
    assert drift.gain_kept is None
    assert drift.gain_kept_stderr is None


def test_full_agreement_of_few_tokens_is_not_certain() -> None:
    values = np.ones(20)
    few = compare(measurement(values), measurement(values), measurement(values + 1), tokens(10, 2))
    assert few.same_top1 == 1
    assert 0.03 < few.same_top1_stderr < 0.1


def test_one_window_falls_back_to_pieces() -> None:
    values = np.random.default_rng(2).normal(size=500)
    error = Bootstrap(tokens(1, 500)).stderr(lambda mean: mean, values)
    assert error == pytest.approx(1 / np.sqrt(500), rel=0.3)
