"""The corrected target and the retention of a delta, against their equations in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qlora_export.quant.rounding.target import DAMPING, corrected_target, retention
from tests.helpers.values import random_values
from tests.quant.rounding.cases import hessian_of, numbers, weights_of


def moments(columns: int, tokens: int, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of a trained and of a rounded prefix, and their H and C."""
    trained = torch.from_numpy(random_values(tokens, columns, seed=1, scale=1))
    rounded = trained + noise * torch.from_numpy(random_values(tokens, columns, seed=2, scale=1))
    return trained, rounded, rounded.T @ rounded / tokens, trained.T @ rounded / tokens


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (7, 96)])
def test_the_target_is_the_equation(rows: int, columns: int, strength: float) -> None:
    target = weights_of(rows, columns)
    _, _, hessian, crossed = moments(columns, 500, 0.3)
    damped = numbers(hessian) + DAMPING * np.diagonal(numbers(hessian)).mean() * np.eye(columns)
    change = numbers(target) @ (numbers(crossed) - numbers(hessian)) @ np.linalg.inv(damped)
    found = corrected_target(target, hessian, crossed, strength)
    np.testing.assert_allclose(found, numbers(target) + strength * change, atol=1e-6)


def test_with_the_corrected_target_the_output_is_nearer_to_the_trained_one() -> None:
    target = weights_of(9, 64)
    trained, rounded, hessian, crossed = moments(64, 800, 0.3)
    corrected = corrected_target(target, hessian, crossed, 1.0)
    wanted = trained @ target.T
    assert (rounded @ corrected.T - wanted).square().sum() < 0.9 * (rounded @ target.T - wanted).square().sum()


def test_undisturbed_inputs_change_nothing_at_all() -> None:
    target, hessian = weights_of(5, 96), hessian_of(96)
    assert torch.equal(corrected_target(target, hessian, hessian.clone(), 1.0), target)


def test_moments_without_an_inverse_leave_the_target() -> None:
    target, hessian = weights_of(5, 32), torch.full((32, 32), float("nan"))
    assert torch.equal(corrected_target(target, hessian, hessian, 1.0), target)


def test_retention_is_one_for_the_delta_and_none_without_it() -> None:
    delta, hessian = weights_of(5, 96), hessian_of(96)
    assert retention(delta, delta, hessian) == pytest.approx(1)
    assert retention(0.25 * delta, delta, hessian) == pytest.approx(0.25)
    assert retention(torch.zeros_like(delta), delta, hessian) == 0
    found = delta + weights_of(5, 96, seed=4)
    weighted = numbers(delta) @ numbers(hessian)
    assert retention(found, delta, hessian) == pytest.approx(
        float((numbers(found) * weighted).sum() / (numbers(delta) * weighted).sum()), rel=1e-5
    )
    assert retention(delta, torch.zeros_like(delta), hessian) == 1
