"""Scales of a row against dense least squares with the square root of the second moments, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qlora_export.quant.rounding import scale_fit
from qlora_export.quant.rounding.grid import Grid
from qlora_export.quant.rounding.scale_fit import RIDGE, fit_scales
from qlora_export.quant.rounding.scale_search import absmax_scales
from tests.quant.rounding.cases import GRIDS, grid_of, hessian_of, numbers, objective, of_blocks, weights_of


def dense(target: Any, hessian: Any, levels: Any, grid: Grid, scales: Any) -> Any:
    """The scales of every block by lstsq over all its rows, with the ridge as more equations."""
    eigenvalues, vectors = np.linalg.eigh(hessian)
    root = vectors * np.sqrt(eigenvalues.clip(0)) @ vectors.T
    found = np.empty_like(scales)
    for block in range(len(scales)):
        systems, wanted = [], []
        for row in range(block * grid.height, min((block + 1) * grid.height, len(target))):
            columns = np.zeros((target.shape[1], scales.shape[1]))
            for number in range(scales.shape[1]):
                place = slice(number * grid.group, (number + 1) * grid.group)
                columns[place, number] = levels[row, place]
            systems.append(root @ columns)
            wanted.append(root @ target[row])
        system = np.concatenate(systems)
        ridge = np.sqrt(RIDGE * (system**2).sum(axis=0).mean())
        system = np.concatenate([system, ridge * np.eye(scales.shape[1])])
        found[block] = np.linalg.lstsq(system, np.concatenate([*wanted, ridge * scales[block]]), rcond=None)[0]
    return found


SOLVED = ["nf4-float-32", "nf4-float-64", "int4-float-row", "int4-signed-64", "int4-float-32x3", "e4m3-float-64x128"]


@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (7, 192)])
def test_scales_are_those_of_dense_least_squares(name: str, rows: int, columns: int) -> None:
    target, hessian = weights_of(rows, columns, seed=rows), hessian_of(columns)
    grid = grid_of(name, target)
    scales = absmax_scales(target, grid) * 0.9
    codes = grid.nearest(target, scales)
    found = fit_scales(target, hessian, grid, scales, codes)
    levels = np.asarray(grid.levels)[codes.numpy()]
    expected = dense(numbers(target), numbers(hessian), levels, grid, numbers(scales))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.sampled(1, per="name")
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("seed", range(3))
def test_it_never_raises_the_objective_of_a_block(name: str, seed: int) -> None:
    target, hessian = weights_of(15, 192, seed=seed), hessian_of(192, seed=seed, tokens=150)
    grid = grid_of(name, target)
    scales = grid.rule(absmax_scales(target, grid))
    codes = grid.nearest(target, scales)
    found = fit_scales(target, hessian, grid, scales, codes)
    assert torch.equal(grid.rule(found), found)
    before = of_blocks(grid, objective(target, hessian, grid.decode(codes, scales)))
    after = of_blocks(grid, objective(target, hessian, grid.decode(codes, found)))
    assert (after <= before * (1 + 1e-6)).all()
    assert name == "e2m1-power-32" or after.sum() < before.sum(), "powers of two have nowhere to go"


@pytest.mark.parametrize("name", ["nf4-nested-32", "e4m3-bf16-32x4"])
def test_pieces_of_rows_give_the_same_scales(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, hessian = weights_of(130, 192), hessian_of(192)
    grid = grid_of(name, target)
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


def test_a_scale_does_not_turn_negative() -> None:
    """A group whose codes point away from the target: least squares alone would mirror it."""
    target, hessian = torch.ones(1, 32), torch.eye(32)
    grid = grid_of("int4-bf16-16", target)
    codes = torch.full((1, 32), 9)
    codes[0, 16:] = 7
    scales = torch.full((1, 2), 0.5)
    found = fit_scales(target, hessian, grid, scales, codes)
    assert found.tolist() == [[pytest.approx(1, rel=1e-2), 0.5]]
