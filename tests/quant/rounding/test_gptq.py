"""Error feedback against a loop over columns that updates the whole inverse, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qlora_export.quant.rounding.gptq import DAMPINGS, feed_back, invert
from qlora_export.quant.rounding.scale_search import absmax_scales, search_scales
from tests.quant.rounding.cases import GRIDS, MARGIN, grid_of, hessian_of, nearest_level, numbers, objective, weights_of


def one_by_one(target: Any, hessian: Any, levels: Any, spread: Any) -> tuple[Any, Any]:
    """Codes of every row, and how near to a tie the nearest of its decisions was, in parts of a scale."""
    rows, columns = target.shape
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    inverse = np.linalg.inv(hessian + DAMPINGS[0] * np.diagonal(hessian).mean() * np.eye(columns))
    codes, closest, left = np.zeros((rows, columns), int), np.full(rows, np.inf), target.copy()
    for column in order:
        for row in range(rows):
            scale = spread[row, column]
            codes[row, column], distance = nearest_level(levels, left[row, column] / scale)
            closest[row] = min(closest[row], distance)
            error = (left[row, column] - levels[codes[row, column]] * scale) / inverse[column, column]
            left[row] -= error * inverse[column]
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes, closest


@pytest.mark.sampled(1, per="name")
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (7, 192), (4, 320)])
def test_codes_are_those_of_the_plain_loop(name: str, rows: int, columns: int) -> None:
    target, hessian = weights_of(rows, columns, seed=rows), hessian_of(columns, seed=columns)
    grid = grid_of(name, target)
    scales = grid.rule(search_scales(target, hessian.diagonal(), grid))
    inverse = invert(hessian)
    assert inverse is not None
    assert inverse.damping == DAMPINGS[0]
    codes = feed_back(target, inverse, grid, scales).numpy()
    levels = np.asarray(grid.levels)
    expected, closest = one_by_one(numbers(target), numbers(hessian), levels, numbers(grid.spread(scales, len(target))))
    clear = closest > MARGIN * (1 + np.abs(levels).max() / 8)
    assert clear.any()
    np.testing.assert_array_equal(codes[clear], expected[clear])
    values, theirs = numbers(grid.decode(torch.from_numpy(codes), scales)), levels[expected]
    wanted = objective(target, hessian, theirs * numbers(grid.spread(scales, len(target))))
    np.testing.assert_allclose(objective(target, hessian, values).sum(), wanted.sum(), rtol=0.05)


@pytest.mark.parametrize("name", ["nf4-nested-64", "int4-bf16-32"])
def test_it_leaves_less_error_of_the_output_than_the_nearest(name: str) -> None:
    target, hessian = weights_of(31, 192, seed=1), hessian_of(192)
    grid = grid_of(name, target)
    scales = grid.rule(absmax_scales(target, grid))
    inverse = invert(hessian)
    assert inverse is not None
    found = objective(target, hessian, grid.decode(feed_back(target, inverse, grid, scales), scales))
    nearest = objective(target, hessian, grid.decode(grid.nearest(target, scales), scales))
    assert found.sum() < 0.7 * nearest.sum()


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    hessian = hessian_of(96)
    inverse = invert(hessian)
    assert inverse is not None
    ordered = numbers(hessian)[np.ix_(inverse.order, inverse.order)]
    assert (np.diff(np.diagonal(ordered)) <= 0).all()
    damped = ordered + DAMPINGS[0] * np.diagonal(ordered).mean() * np.eye(96)
    upper = numbers(inverse.upper)
    np.testing.assert_allclose(np.tril(upper, -1), 0)
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(96), atol=1e-3)


def test_columns_that_are_never_used_are_rounded_to_nearest() -> None:
    target, hessian = weights_of(5, 128), hessian_of(128)
    hessian[100:] = 0
    hessian[:, 100:] = 0
    grid = grid_of("nf4-float-64", target)
    scales = absmax_scales(target, grid)
    inverse = invert(hessian)
    assert inverse is not None
    codes = feed_back(target, inverse, grid, scales)
    assert torch.equal(codes[:, 100:], grid.nearest(target, scales)[:, 100:])


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_moments_that_say_nothing_have_no_inverse(value: float) -> None:
    assert invert(torch.full((32, 32), value)) is None


def test_damping_grows_until_the_moments_can_be_inverted() -> None:
    hessian = torch.eye(16)
    hessian[0, 1] = hessian[1, 0] = 1.05
    inverse = invert(hessian)
    assert inverse is not None
    assert inverse.damping == DAMPINGS[1]
    hessian[0, 1] = hessian[1, 0] = 5
    assert invert(hessian) is None


def test_what_lies_on_the_grid_stays_there() -> None:
    target, hessian = weights_of(6, 192), hessian_of(192)
    grid = grid_of("nf4-nested-64", target)
    scales = grid.rule(absmax_scales(target, grid))
    codes = grid.nearest(target, scales)
    inverse = invert(hessian)
    assert inverse is not None
    assert torch.equal(feed_back(grid.decode(codes, scales), inverse, grid, scales), codes)
