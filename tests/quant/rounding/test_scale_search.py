"""The search against trying every candidate, one group at a time, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qlora_export.quant.rounding import scale_search
from qlora_export.quant.rounding.grid import Grid
from qlora_export.quant.rounding.scale_search import FRACTIONS, absmax_scales, group_errors, search_scales
from tests.quant.rounding.cases import GRIDS, grid_of, hessian_of, numbers, weights_of


def error_of(grid: Grid, target: Any, weights: Any, scale: float) -> float:
    """Weighted squared error of the best codes of one group."""
    levels = np.asarray(grid.levels, np.float64) * scale
    return float((np.abs(target[:, None] - levels[None]).min(axis=1) ** 2 * weights).sum())


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("rows", [1, 5])
def test_no_candidate_is_better(name: str, rows: int) -> None:
    target, weights = weights_of(rows, 192, seed=rows), hessian_of(192).diagonal()
    grid = grid_of(name, target)
    found = grid.rule(search_scales(target, weights, grid))
    largest = absmax_scales(target, grid)
    signs = (1, -1) if grid.signed else (1,)
    candidates = torch.stack([grid.rule(largest * (sign * part)) for part in FRACTIONS for sign in signs])
    reported = group_errors(target, weights, grid, found)
    for block in range(len(found)):
        for group in range(found.shape[1]):
            place = slice(group * grid.group, (group + 1) * grid.group)
            part = numbers(target[block * grid.height : (block + 1) * grid.height, place])
            one, heavy = part.reshape(-1), np.tile(numbers(weights[place]), len(part))
            errors = [error_of(grid, one, heavy, float(scale)) for scale in candidates[:, block, group]]
            least = error_of(grid, one, heavy, float(found[block, group]))
            assert least <= min(errors) * (1 + 1e-5)
            assert float(reported[block, group]) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("name", ["nf4-float-32", "int4-float-32"])
def test_the_best_candidate_is_refined_by_least_squares(name: str) -> None:
    target, weights = weights_of(4, 96, seed=3), hessian_of(96).diagonal()
    grid = grid_of(name, target)
    found = search_scales(target, weights, grid)
    largest = absmax_scales(target, grid)
    for row in range(4):
        for group in range(3):
            place = slice(group * 32, (group + 1) * 32)
            one, heavy = numbers(target[row, place]), numbers(weights[place])
            best = min(
                (part * float(largest[row, group]) for part in FRACTIONS),
                key=lambda scale: error_of(grid, one, heavy, scale),
            )
            for _ in range(2):
                levels = np.asarray(grid.levels)[np.abs(one[:, None] / best - np.asarray(grid.levels)).argmin(axis=1)]
                refit = float((heavy * one * levels).sum() / (heavy * levels**2).sum())
                if error_of(grid, one, heavy, refit) < error_of(grid, one, heavy, best):
                    best = refit
            assert float(found[row, group]) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("name", [*GRIDS, "fp4-nested-64"])
def test_it_never_leaves_more_error_than_absmax_scales(name: str) -> None:
    target, weights = weights_of(33, 192, seed=7), hessian_of(192, seed=1).diagonal()
    grid = grid_of(name, target)
    found = group_errors(target, weights, grid, grid.rule(search_scales(target, weights, grid)))
    usual = group_errors(target, weights, grid, grid.rule(absmax_scales(target, grid)))
    assert (found <= usual).all()
    assert found.sum() < usual.sum()


@pytest.mark.parametrize("name", ["nf4-nested-64", "int4-signed-64"])
def test_known_scales_win_where_nothing_is_better(name: str) -> None:
    target, weights = weights_of(9, 192, seed=2), hessian_of(192).diagonal()
    grid = grid_of(name, target)
    known = grid.rule(absmax_scales(target, grid) * 1.01)
    exact = grid.decode(grid.nearest(target, known), known)
    assert torch.equal(search_scales(exact, weights, grid, known), known)


@pytest.mark.parametrize("piece", [1, 192 * 50])
def test_blocks_of_rows_stay_whole_in_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target, weights = weights_of(151, 192, seed=5), hessian_of(192).diagonal()
    grid = grid_of("e4m3-bf16-64x16", target)
    whole = search_scales(target, weights, grid)
    assert whole.shape == (10, 3)
    monkeypatch.setattr(scale_search, "PIECE_WEIGHTS", piece)
    assert torch.equal(search_scales(target, weights, grid), whole)


@pytest.mark.parametrize("piece", [1, 192 * 50])
def test_a_weight_is_searched_in_pieces_to_the_same_scales(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a nested second level each row has its own; a piece must know which."""
    target, weights = weights_of(151 if piece > 1 else 9, 192, seed=5), hessian_of(192).diagonal()
    target *= torch.linspace(1, 9, len(target))[:, None]
    grid = grid_of("nf4-nested-32", target)
    known = grid.rule(absmax_scales(target, grid))
    exact = grid.decode(grid.nearest(target, known), known)
    whole, kept = search_scales(target, weights, grid), search_scales(exact, weights, grid, known)
    monkeypatch.setattr(scale_search, "PIECE_WEIGHTS", piece)
    assert torch.equal(search_scales(target, weights, grid), whole)
    assert torch.equal(search_scales(exact, weights, grid, known), kept)
    assert torch.equal(kept, known)


def test_groups_of_zeros_and_inputs_that_are_never_there() -> None:
    target = weights_of(3, 128)
    target[1, :64] = 0
    grid = grid_of("nf4-float-64", target)
    weights = torch.ones(128)
    weights[64:] = 0
    found = search_scales(target, weights, grid)
    assert torch.isfinite(found).all()
    assert found[1, 0] == 0
    assert torch.equal(found[:, 1], absmax_scales(target, grid)[:, 1])
