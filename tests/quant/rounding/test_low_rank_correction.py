"""The correction against a dense SVD in float64, and that no rank makes the objective larger."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_export.quant.rounding.low_rank_correction import RIDGE, low_rank_correction
from tests import sampling
from tests.quant.rounding.cases import Float64, hessian_of, numbers, objective, weights_of


def best_objective(error: Float64, hessian: Float64, rank: int) -> tuple[Float64, float]:
    """SVD_r(E R^(1/2)) R^(-1/2), and the ridge objective that it leaves."""
    ridge = hessian + RIDGE * np.trace(hessian) / len(hessian) * np.eye(len(hessian))
    values, vectors = np.linalg.eigh(ridge)
    root = vectors * np.sqrt(values) @ vectors.T
    left, sizes, right = np.linalg.svd(error @ root, full_matrices=False)
    product = left[:, :rank] * sizes[:rank] @ right[:rank] @ np.linalg.inv(root)
    return product, float((sizes[rank:] ** 2).sum())


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize(("rows", "columns"), [(9, 40), (40, 9), (16, 16), (33, 47), (5, 70)])
def test_it_is_the_optimum_of_a_dense_decomposition(rows: int, columns: int, rank: int) -> None:
    error, hessian = weights_of(rows, columns, seed=rows), hessian_of(columns, seed=columns)
    b, a = low_rank_correction(error, hessian, rank)
    assert (b.shape, a.shape) == ((rows, rank), (rank, columns))
    product, left = best_objective(numbers(error), numbers(hessian), rank)
    np.testing.assert_allclose(numbers(b) @ numbers(a), product, atol=2e-6)
    ridge = numbers(hessian) + RIDGE * np.trace(numbers(hessian)) / columns * np.eye(columns)
    assert objective(error, ridge, numbers(b) @ numbers(a)).sum() == pytest.approx(left, rel=1e-4, abs=1e-9)


@settings(max_examples=sampling.examples(30))
@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    rank=st.integers(0, 30),
    tokens=st.integers(1, 40),
    bits=st.booleans(),
)
def test_it_never_makes_the_output_worse(rows: int, columns: int, rank: int, tokens: int, bits: bool) -> None:
    """Fewer tokens than columns leave second moments without an inverse."""
    error, hessian = weights_of(rows, columns, seed=rank), hessian_of(columns, seed=rows, tokens=tokens)
    stored = (lambda factor: factor.bfloat16().float()) if bits else (lambda factor: factor)
    b, a = low_rank_correction(error, hessian, rank, stored)
    before = objective(error, hessian, np.zeros(error.shape)).sum()
    after = objective(error, hessian, numbers(b) @ numbers(a)).sum()
    assert after <= before * (1 + 1e-6)
    if rank >= min(rows, columns) and not bits:
        assert after == pytest.approx(0, abs=1e-6 * before)


def test_more_components_are_better() -> None:
    error, hessian = weights_of(48, 64), hessian_of(64)
    left = [objective(error, hessian, numbers(b) @ numbers(a)).sum() for b, a in _of_ranks(error, hessian)]
    assert all(after < 0.99 * before for before, after in itertools.pairwise(left))


def _of_ranks(error: torch.Tensor, hessian: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [low_rank_correction(error, hessian, rank) for rank in (0, 1, 2, 4, 8, 16, 32)]


def test_no_rank_no_error_and_no_inputs_are_no_correction() -> None:
    error, hessian = weights_of(6, 10), hessian_of(10)
    b, a = low_rank_correction(error, hessian, 0)
    assert (b.shape, a.shape) == ((6, 0), (0, 10))
    for wanted, moments in ((0 * error, hessian), (error, 0 * hessian)):
        b, a = low_rank_correction(wanted, moments, 2)
        assert not b.any()
        assert not a.any()


def test_the_factors_share_the_size_of_each_component() -> None:
    """Neither overflows nor underflows in 16 bits."""
    b, a = low_rank_correction(1e-3 * weights_of(64, 96), hessian_of(96), 4)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1), rtol=1e-4, atol=0)


def test_factors_that_do_not_help_once_they_are_rounded_are_zero() -> None:
    error, hessian = weights_of(6, 10), hessian_of(10)
    b, a = low_rank_correction(error, hessian, 2, lambda factor: -factor.abs().ceil() * 1e3)
    assert not b.any()
    assert not a.any()
