"""KL of log-probabilities against the same sum in long double, from no difference to another distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qlora_export.drift.divergence import divergences


def pair(difference: float, vocabulary: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, vocabulary, generator=random) * 3
    other = logits + difference * torch.randn(7, vocabulary, generator=random)
    return torch.log_softmax(logits, -1).numpy(), torch.log_softmax(other, -1).numpy()


def exact(reference: np.ndarray, model: np.ndarray) -> np.ndarray:
    wide = reference.astype(np.longdouble)
    difference = wide - model
    found: np.ndarray = (np.exp(wide) * (difference + np.expm1(-difference))).sum(axis=1).astype(float)
    return found


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 1000])
@pytest.mark.parametrize("difference", [1e-4, 1e-2, 0.25, 1.0, 30.0])
def test_it_is_the_sum_in_long_double(difference: float, vocabulary: int) -> None:
    reference, model = pair(difference, vocabulary)
    assert divergences(reference, model) == pytest.approx(exact(reference, model), rel=1e-7, abs=1e-16)


def test_equal_rows_have_exactly_none_and_rounding_makes_none() -> None:
    reference, model = pair(1.0, 5000)
    assert (divergences(reference, reference) == 0).all()
    assert (divergences(model, model) == 0).all()
    # One unit in the last place of every entry, and nothing else: the sums of both are some 1e-7 apart.
    moved = np.nextafter(reference, np.float32(0))
    assert 0 < divergences(reference, moved).max() < 1e-12
    assert abs((np.exp(reference.astype(float)) * (reference.astype(float) - moved)).sum(axis=1)).max() > 1e-8


def test_against_the_textbook_sum() -> None:
    reference, model = pair(0.5, 300)
    wide = reference.astype(np.float64)
    textbook = (np.exp(wide) * (wide - model)).sum(axis=1)
    assert divergences(reference, model) == pytest.approx(textbook, rel=1e-5)


def test_what_cannot_come_counts_for_nothing_and_what_is_excluded_is_infinite() -> None:
    reference, model = pair(0.5, 40)
    without, both, spoilt = reference.copy(), model.copy(), model.copy()
    without[:, 3], both[:, 3], spoilt[2, 5] = -np.inf, -np.inf, np.nan
    rest = [place for place in range(40) if place != 3]
    assert divergences(without, both) == pytest.approx(divergences(without[:, rest], both[:, rest]))
    assert np.isfinite(divergences(without, model)).all()
    assert np.isinf(divergences(reference, both)).all()
    assert np.isnan(divergences(reference, spoilt)).tolist() == [False, False, True, False, False, False, False]
