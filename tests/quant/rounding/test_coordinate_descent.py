"""A sweep against trying every level of every weight by the whole objective, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qlora_export.quant.rounding.coordinate_descent import row_objective, sweep
from qlora_export.quant.rounding.scale_search import absmax_scales
from tests.quant.rounding.cases import GRIDS, MARGIN, grid_of, hessian_of, numbers, objective, weights_of


def every_level(target: Any, hessian: Any, levels: Any, spread: Any, codes: Any) -> tuple[Any, Any]:
    """Codes of every row after one weight after the other took its best level, and its closest decision."""
    codes, closest = codes.copy(), np.full(len(target), np.inf)
    for row in range(len(target)):
        for column in range(target.shape[1]):
            if hessian[column, column] <= 0:
                continue
            tried = np.repeat((levels[codes[row]] * spread[row] - target[row])[None], len(levels), axis=0)
            tried[:, column] = levels * spread[row, column] - target[row, column]
            found = (tried @ hessian * tried).sum(axis=1)
            codes[row, column] = found.argmin()
            # Objectives of two neighbours differ by twice curvature, step and distance from the tie.
            worse = np.sort(found[levels != levels[found.argmin()]])[0] - found.min()
            step = np.diff(np.unique(levels)).min() * spread[row, column] ** 2
            closest[row] = min(closest[row], worse / (2 * hessian[column, column] * step))
    return codes, closest


@pytest.mark.parametrize("name", [*GRIDS[:-2], "int4-signed-64"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (2, 192)])
def test_codes_are_those_of_trying_every_level(name: str, rows: int, columns: int) -> None:
    target, hessian = weights_of(rows, columns, seed=rows), hessian_of(columns, seed=columns)
    grid = grid_of(name, target)
    scales = grid.rule(absmax_scales(target, grid) * (-0.9 if grid.signed else 0.9))
    start = grid.nearest(target, scales)
    found = sweep(target, hessian, grid, scales, start)
    spread = numbers(grid.spread(scales, len(target)))
    expected, closest = every_level(numbers(target), numbers(hessian), np.asarray(grid.levels), spread, start.numpy())
    clear = closest > MARGIN
    assert clear.any()
    np.testing.assert_array_equal(found.numpy()[clear], expected[clear])
    assert (found != start).any()


@pytest.mark.sampled(1, per="name")
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_sweep_never_raises_the_objective(name: str, seed: int) -> None:
    target, hessian = weights_of(9, 192, seed=seed), hessian_of(192, seed=seed, tokens=100 + 100 * seed)
    grid = grid_of(name, target)
    scales = grid.rule(absmax_scales(target, grid))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(len(grid.levels), target.shape, generator=generator)
    before = objective(target, hessian, grid.decode(codes, scales))
    for _ in range(3):
        codes = sweep(target, hessian, grid, scales, codes)
        after = objective(target, hessian, grid.decode(codes, scales))
        assert (after <= before * (1 + 1e-6)).all()
        before = after


def test_the_objective_is_that_of_float64() -> None:
    target, hessian = weights_of(5, 96), hessian_of(96)
    values = target + 0.1 * weights_of(5, 96, seed=9)
    np.testing.assert_allclose(row_objective(target, hessian, values), objective(target, hessian, values), rtol=1e-5)


def test_columns_without_inputs_and_groups_without_scale_stay() -> None:
    target, hessian = weights_of(4, 192), hessian_of(192)
    hessian[150:] = 0
    hessian[:, 150:] = 0
    grid = grid_of("nf4-float-64", target)
    scales = absmax_scales(target, grid)
    scales[2, 0] = 0
    start = torch.full(target.shape, 3)
    found = sweep(target, hessian, grid, scales, start)
    assert (found[:, 150:] == 3).all()
    assert torch.isfinite(grid.decode(found, scales)).all()
    assert not grid.decode(found, scales)[2, :64].any()


def test_the_best_of_all_stays() -> None:
    target, hessian = weights_of(6, 192), hessian_of(192)
    grid = grid_of("nf4-nested-64", target)
    scales = grid.rule(absmax_scales(target, grid))
    codes = grid.nearest(target, scales)
    assert torch.equal(sweep(grid.decode(codes, scales), hessian, grid, scales, codes), codes)
