"""Levels, scales as they can be stored, and what lies nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qlora_export.quant import double_quant
from qlora_export.quant.rounding.grid import DoubleQuantScales, Grid, fitted_double_quant_scales, nonzero
from qlora_export.quant.rounding.scale_search import absmax_scales
from tests.helpers.values import random_values
from tests.quant.rounding.cases import FP4_LEVELS, GRIDS, INT4_LEVELS, grid_of, nearest_level, weights_of


@pytest.mark.parametrize("name", [*GRIDS, "fp4-nested-64"])
@pytest.mark.parametrize("rows", [1, 7])
def test_nearest_is_what_trying_every_level_finds(name: str, rows: int) -> None:
    values = weights_of(rows, 192, seed=rows)
    grid = grid_of(name, values)
    scales = grid.rule(absmax_scales(values, grid) * 0.9)
    codes, decoded = grid.nearest(values, scales), grid.decode(grid.nearest(values, scales), scales)
    for row in range(rows):
        for column in range(192):
            scale = float(scales[row // grid.height, column // grid.group])
            best, _ = nearest_level(grid.levels, float(values[row, column]) / scale)
            missed = abs(grid.levels[int(codes[row, column])] * scale - float(values[row, column]))
            assert missed <= abs(grid.levels[best] * scale - float(values[row, column])) * (1 + 1e-5) + 1e-9
            assert float(decoded[row, column]) == pytest.approx(grid.levels[int(codes[row, column])] * scale)


def test_a_value_halfway_belongs_to_the_lower_level_as_in_bitsandbytes() -> None:
    grid = Grid(INT4_LEVELS, 4, lambda scales: scales)
    values = torch.tensor([[-0.5, 0.5, 1.5, 9.0]])
    assert grid.nearest(values, torch.ones(1, 1)).tolist() == [[7, 8, 9, 15]]


def test_a_negative_scale_mirrors_the_levels() -> None:
    grid = Grid(INT4_LEVELS, 2, lambda scales: scales, signed=True)
    codes = grid.nearest(torch.tensor([[8.0, -7.0]]), torch.tensor([[-1.0]]))
    assert grid.decode(codes, torch.tensor([[-1.0]])).tolist() == [[8.0, -7.0]]


def test_the_two_zeros_of_fp4_are_one_number() -> None:
    grid = Grid(FP4_LEVELS, 2, lambda scales: scales)
    assert grid.nearest(torch.tensor([[0.0, -0.0]]), torch.ones(1, 1)).tolist() == [[7, 7]]


def test_groups_of_zeros_stay_zero() -> None:
    grid = grid_of("nf4-float-32", weights_of(2, 64))
    values, scales = torch.zeros(2, 64), torch.zeros(2, 2)
    assert not grid.decode(grid.nearest(values, scales), scales).any()
    assert nonzero(scales).min() > 0


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (3, 5), (40, 13), (300, 2)])
def test_nested_scales_are_the_nearest_that_can_be_stored(rows: int, groups: int) -> None:
    wanted = np.abs(random_values(rows, groups, seed=groups)) + np.float32(0.03)
    rule = fitted_double_quant_scales(torch.from_numpy(wanted))
    stored = rule(torch.from_numpy(wanted)).numpy().reshape(-1)
    every = double_quant.dynamic_map().astype(np.float64)
    for place, value in enumerate(wanted.reshape(-1)):
        choices = every * float(rule.nested_absmax[place // double_quant.BLOCK]) + rule.offset
        assert abs(stored[place] - value) <= np.abs(choices - value).min() + 1e-8


@pytest.mark.parametrize("size", [1, 255, 257, 5000])
def test_codes_on_stored_scales_are_the_stored_codes(size: int) -> None:
    absmax = np.abs(random_values(size, seed=size)) + np.float32(0.02)
    offset = double_quant.mean(absmax)
    codes, nested_absmax = double_quant.encode(absmax, offset)
    stored = double_quant.decode(codes, nested_absmax, offset)
    assert double_quant.codes_on(stored, nested_absmax, offset).tobytes() == codes.tobytes()
    rule = DoubleQuantScales(float(offset), torch.from_numpy(nested_absmax))
    assert rule(torch.from_numpy(stored)[None]).numpy().tobytes() == stored.tobytes()


def test_on_a_flat_second_level_values_stay_where_codes_may_not() -> None:
    """All but equal absmax: float32 sums merge the finest steps of the map, so that other codes give the same value."""
    absmax = np.float32(0.5) + np.float32(1e-5) * random_values(2000).clip(-1, 1)
    offset = double_quant.mean(absmax)
    codes, nested_absmax = double_quant.encode(absmax, offset)
    stored = double_quant.decode(codes, nested_absmax, offset)
    again = double_quant.codes_on(stored, nested_absmax, offset)
    assert double_quant.decode(again, nested_absmax, offset).tobytes() == stored.tobytes()


def test_rows_of_a_weight_have_the_second_level_at_their_place() -> None:
    scales = torch.from_numpy(np.abs(random_values(300, 4, seed=1)) + np.float32(0.02))
    whole = Grid(INT4_LEVELS, 8, fitted_double_quant_scales(scales))
    for first in (0, 1, 63, 64, 200):
        part = whole.rows_from(first * 4).rule(scales[first:])
        assert torch.equal(part, whole.rule(scales)[first:])
