"""Scales of a row against dense least squares with the square root of the second moments, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qlora_export.quant.rounding import scale_fit
from qlora_export.quant.rounding.scale_fit import RIDGE, fit_scales
from qlora_export.quant.rounding.scale_search import absmax_scales
from tests.quant.rounding.cases import GRIDS, grid_of, hessian_of, numbers, objective, weights_of


def dense(target: Any, hessian: Any, levels: Any, group: int, scales: Any) -> Any:
    """The scales of every row by lstsq, with the ridge as more equations."""
    eigenvalues, vectors = np.linalg.eigh(hessian)
    root = vectors * np.sqrt(eigenvalues.clip(0)) @ vectors.T
    found = np.empty_like(scales)
    for row in range(len(target)):
        columns = np.zeros((target.shape[1], scales.shape[1]))
        for number in range(scales.shape[1]):
            place = slice(number * group, (number + 1) * group)
            columns[place, number] = levels[row, place]
        system = root @ columns
        ridge = np.sqrt(RIDGE * (system**2).sum(axis=0).mean())
        system = np.concatenate([system, ridge * np.eye(scales.shape[1])])
        wanted = np.concatenate([root @ target[row], ridge * scales[row]])
        found[row] = np.linalg.lstsq(system, wanted, rcond=None)[0]
    return found


@pytest.mark.parametrize("name", ["nf4-float-32", "nf4-float-64", "int4-float-row", "int4-signed-64"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (7, 192)])
def test_scales_are_those_of_dense_least_squares(name: str, rows: int, columns: int) -> None:
    target, hessian = weights_of(rows, columns, seed=rows), hessian_of(columns)
    grid = grid_of(name, target)
    scales = absmax_scales(target, grid) * 0.9
    codes = grid.nearest(target, scales)
    found = fit_scales(target, hessian, grid, scales, codes)
    levels = np.asarray(grid.levels)[codes.numpy()]
    expected = dense(numbers(target), numbers(hessian), levels, grid.group, numbers(scales))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("seed", range(3))
def test_it_never_raises_the_objective_of_a_row(name: str, seed: int) -> None:
    target, hessian = weights_of(15, 192, seed=seed), hessian_of(192, seed=seed, tokens=150)
    grid = grid_of(name, target)
    scales = grid.rule(absmax_scales(target, grid))
    codes = grid.nearest(target, scales)
    found = fit_scales(target, hessian, grid, scales, codes)
    assert torch.equal(grid.rule(found), found)
    before = objective(target, hessian, grid.decode(codes, scales))
    after = objective(target, hessian, grid.decode(codes, found))
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < before.sum()


def test_pieces_of_rows_give_the_same_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    target, hessian = weights_of(130, 192), hessian_of(192)
    grid = grid_of("nf4-nested-32", target)
    scales = grid.rule(absmax_scales(target, grid))
    codes = grid.nearest(target, scales)
    whole = fit_scales(target, hessian, grid, scales, codes)
    monkeypatch.setattr(scale_fit, "PIECE_VALUES", 7 * 36)
    assert torch.equal(fit_scales(target, hessian, grid, scales, codes), whole)


def test_groups_of_zeros_and_moments_of_zeros_keep_their_scales() -> None:
    target = weights_of(4, 128)
    target[1, :64] = 0
    grid = grid_of("nf4-float-64", target)
    scales = absmax_scales(target, grid)
    codes = grid.nearest(target, scales)
    assert torch.isfinite(fit_scales(target, hessian_of(128), grid, scales, codes)).all()
    assert torch.equal(fit_scales(target, torch.zeros(128, 128), grid, scales, codes), scales)


def test_scales_that_are_right_stay() -> None:
    target, hessian = weights_of(6, 192), hessian_of(192)
    grid = grid_of("nf4-nested-64", target)
    scales = grid.rule(absmax_scales(target, grid))
    codes = grid.nearest(target, scales)
    assert torch.equal(fit_scales(grid.decode(codes, scales), hessian, grid, scales, codes), scales)
