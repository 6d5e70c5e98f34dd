"""Two ways of running one model: what counts as the same."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qlora_export.drift.onnx.variants import SAME_MODEL_KL, Distance, distance, near_tie_nats


def rows(*probabilities: list[float]) -> list[np.ndarray]:
    return [np.log(np.array(probabilities, np.float32))]


def judged(first: list[np.ndarray], second: list[np.ndarray], limit: float | None = SAME_MODEL_KL) -> Distance:
    return distance(first, second, limit)


def test_the_same_rows_have_no_distance() -> None:
    found = judged(rows([0.5, 0.3, 0.2], [0.1, 0.2, 0.7]), rows([0.5, 0.3, 0.2], [0.1, 0.2, 0.7]))
    assert (found.tokens, found.mean_kl, found.max_kl, found.top1_differs, found.near_ties) == (2, 0, 0, 0, 0)
    assert found.agrees


def test_kl_is_that_of_the_second_from_the_first() -> None:
    found = judged(rows([0.5, 0.5]), rows([0.9, 0.1]))
    assert found.mean_kl == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-6)
    assert not found.agrees
    assert found.said().startswith("mean KL 0.51 over 1 tokens, the limit is at most 0.0001")


def test_a_tie_that_rounding_turns_over_is_near() -> None:
    found = judged(rows([0.501, 0.499]), rows([0.499, 0.501]))
    assert (found.top1_differs, found.near_ties) == (0, 1)
    assert found.agrees


def test_a_lead_in_one_way_alone_is_no_near_tie() -> None:
    close, far = [0.5005, 0.4995], [0.47, 0.53]
    for first, second in ((close, far), (far, close)):
        found = judged(rows(first), rows(second))
        assert (found.top1_differs, found.near_ties) == (1, 0)


def test_one_other_token_among_many_fails_where_kl_does_not() -> None:
    same = [[0.6, 0.4]] * 999
    found = judged(rows(*same, [0.49, 0.51]), rows(*same, [0.51, 0.49]))
    assert found.mean_kl < SAME_MODEL_KL
    assert not found.agrees
    assert found.said() == "1 of 1000 most likely tokens differ, near ties not counted"


def test_what_is_not_finite_never_agrees() -> None:
    found = judged(rows([0.5, 0.5]), [np.array([[np.nan, np.nan]], np.float32)])
    assert math.isnan(found.mean_kl)
    assert not found.agrees


def test_a_near_tie_is_what_the_limit_could_come_from() -> None:
    """Moving d nats between two tokens of a half each: the KL is d^2 / 8 for small d."""
    odds = math.exp(near_tie_nats(SAME_MODEL_KL))
    found = judged(rows([0.5, 0.5]), rows([odds / (1 + odds), 1 / (1 + odds)]))
    assert found.mean_kl == pytest.approx(SAME_MODEL_KL, rel=1e-3)


def test_without_a_limit_nothing_is_judged() -> None:
    found = judged(rows([0.5, 0.5]), rows([0.9, 0.1]), None)
    assert found.agrees
    assert found.top1_differs == 0


def test_a_wider_limit_has_wider_ties() -> None:
    first, second = rows([0.51, 0.49]), rows([0.49, 0.51])
    assert judged(first, second).top1_differs == 1
    assert judged(first, second, 1e-3).top1_differs == 0
