"""The spread of drift over tokens, against numpy on the same numbers; and the tokens where it is worst."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from qlora_export.drift.distribution import CONFIDENCE_EDGES, KL_EDGES, distribution_of
from qlora_export.drift.results import Measurement
from qlora_export.drift.tokens import Protocol, TokenSet, Window
from qlora_export.drift.worst_tokens import SHOWN, worst_of

WINDOWS = tuple(Window(tuple(range(41)), tuple(range(1, 41)), f"line {n}", n) for n in range(50))
TOKENS = TokenSet(WINDOWS, Protocol("test", "as the test says", 41))
RNG = np.random.default_rng(0)


def measurement(nll: np.ndarray, kl: np.ndarray, confidence: np.ndarray, top1: np.ndarray) -> Measurement:
    return Measurement("m", "r", nll, top1, kl, confidence.astype(np.float32), 0)


def pair() -> tuple[Measurement, Measurement]:
    count = TOKENS.count
    nll, confidence = RNG.gamma(1, 1, count), RNG.uniform(0.01, 1, count)
    reference = measurement(nll, np.zeros(count), confidence, np.zeros(count, np.int64))
    kl = RNG.gamma(0.3, 0.01, count) * (1.1 - confidence)
    said = (RNG.random(count) < 0.1).astype(np.int64)
    return measurement(nll + RNG.normal(0, 0.1, count), kl, confidence, said), reference


def test_quantiles_histogram_and_changes_of_probability() -> None:
    candidate, reference = pair()
    found = distribution_of(candidate, reference, TOKENS)
    assert found.kl_quantiles["0.99"] == pytest.approx(np.quantile(candidate.kl, 0.99))
    assert found.kl_quantiles["1"] == candidate.kl.max()
    edges = np.concatenate([[-np.inf], KL_EDGES, [np.inf]])
    assert list(found.kl_histogram.counts) == np.histogram(candidate.kl, edges)[0].tolist()
    delta = np.exp(-candidate.nll) - np.exp(-reference.nll)
    assert found.delta_p_rms == pytest.approx(np.sqrt((delta**2).mean()))
    assert found.delta_p_mean == pytest.approx(delta.mean())
    assert found.delta_p_quantiles["0.05"] == pytest.approx(np.quantile(delta, 0.05))


def test_buckets_by_confidence_hold_every_token_once() -> None:
    candidate, reference = pair()
    found = distribution_of(candidate, reference, TOKENS)
    assert sum(bucket.tokens for bucket in found.confidence) == TOKENS.count
    for bucket in found.confidence:
        inside = (reference.confidence >= bucket.low) & (reference.confidence < bucket.high)
        assert bucket.mean_kl == pytest.approx(candidate.kl[inside].mean())
        assert bucket.same_top1 == pytest.approx((candidate.top1[inside] == 0).mean())
        # Tokens are independent here, so the error is that of a mean of so many.
        assert bucket.mean_kl_stderr == pytest.approx(candidate.kl[inside].std() / np.sqrt(inside.sum()), rel=0.5)
    assert [bucket.low for bucket in found.confidence] == list(CONFIDENCE_EDGES[:-1])


def test_an_empty_bucket_has_no_numbers() -> None:
    count = TOKENS.count
    sure = measurement(np.ones(count), np.zeros(count), np.full(count, 0.95), np.zeros(count, np.int64))
    found = distribution_of(sure, sure, TOKENS).confidence
    assert [(bucket.tokens, bucket.mean_kl) for bucket in found if bucket.low != 0.9] == [(0, None)] * 5
    assert found[4].tokens == count


def said(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def test_the_worst_tokens_are_named_with_what_stands_before_them() -> None:
    count = TOKENS.count
    kl = np.zeros(count)
    kl[40 * 7 + 29], kl[40 * 3] = 2.0, 3.0
    reference = measurement(np.full(count, 0.5), np.zeros(count), np.ones(count), np.full(count, 8))
    found = worst_of(measurement(np.full(count, 2.0), kl, np.ones(count), np.full(count, 9)), reference, TOKENS, said)
    assert [(token.window, token.position, token.kl) for token in found.tokens] == [(3, 1, 3.0), (7, 30, 2.0)]
    first, second = found.tokens
    assert (first.before, first.token, first.place) == ("0", "1", "line 3")
    assert second.before == said(range(6, 30))
    assert (second.reference_says, second.candidate_says) == ("8", "9")
    assert second.p_reference == pytest.approx(np.exp(-0.5))
    assert second.p_candidate == pytest.approx(np.exp(-2))
    assert [(window.window, window.mean_kl) for window in found.windows] == [(3, 3 / 40), (7, 2 / 40)]
    assert len(worst_of(measurement(kl, kl + 1, kl, kl.astype(int)), reference, TOKENS, said).tokens) == SHOWN
    assert worst_of(reference, reference, TOKENS, said).tokens == ()
