"""The search for small floats against the one on torch tensors, and against nearest, which it never loses to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qlora_export.quant import float4, float8, llm_int8, mse_float_scales, ordered_codes
from qlora_export.quant.mse_float_scales import E2M1, E4M3, INTEGERS, SmallFloat, search_float_groups
from qlora_export.quant.rounding.grid import Grid, e4m3_scales, power_of_two_scales, sixteen_bit_scales
from qlora_export.quant.rounding.scale_search import absmax_scales, search_scales
from tests.helpers.values import random_values

INTEGER_LEVELS = tuple(float(level) for level in range(-127, 128))
CASES: dict[str, tuple[SmallFloat, Grid]] = {
    "fp8": (E4M3, Grid(ordered_codes.E4M3.levels, 256, sixteen_bit_scales(torch.bfloat16))),
    "fp8-block": (E4M3, Grid(ordered_codes.E4M3.levels, 64, sixteen_bit_scales(torch.float16), height=16)),
    "nvfp4": (E2M1, Grid(ordered_codes.E2M1.levels, 16, e4m3_scales(256))),
    "mxfp4": (E2M1, Grid(ordered_codes.E2M1.levels, 32, power_of_two_scales)),
    "int8": (INTEGERS, Grid(INTEGER_LEVELS, 256, lambda scales: scales)),
}


def rule_of(grid: Grid) -> Any:
    return lambda scales: grid.rule(torch.from_numpy(scales)).numpy()


def errors(values: Any, scales: Any, grid: Grid) -> Any:
    """Squared error [blocks, groups] of the nearest levels, in float64."""
    spread = grid.spread(torch.from_numpy(scales), len(values)).double().numpy()
    levels = np.array(grid.levels)
    found = levels[np.searchsorted((levels[:-1] + levels[1:]) / 2, values / np.where(spread > 0, spread, 1))] * spread
    squares = np.square(values - found).reshape(len(values), -1, grid.group).sum(2)
    return np.add.reduceat(squares, np.arange(0, len(values), grid.height), axis=0)


@pytest.mark.parametrize("name", CASES)
def test_scales_are_those_of_the_search_on_tensors(name: str) -> None:
    small, grid = CASES[name]
    values = random_values(37, 256)
    values[5] = 0
    target = torch.from_numpy(values)
    nearest = grid.rule(absmax_scales(target, grid))
    found = search_float_groups(values, nearest.numpy(), small, rule_of(grid), grid.height)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(rule_of(grid)(found), found)
    expected = grid.rule(search_scales(target, torch.ones(256), grid, nearest)).numpy()
    assert np.isclose(found, expected, rtol=1e-6).mean() > 0.9, "but where two candidates are all but equal"
    least, theirs, plain = (errors(values, scales, grid) for scales in (found, expected, nearest.numpy()))
    assert (least <= plain * (1 + 1e-6)).all()
    assert least.sum() < plain.sum()
    assert least.sum() == pytest.approx(theirs.sum(), rel=3e-3)


@pytest.mark.parametrize("name", CASES)
def test_rows_of_a_block_are_cut_off_to_the_same_scales(name: str) -> None:
    small, grid = CASES[name]
    values = random_values(40, 256, seed=3)
    nearest = grid.rule(absmax_scales(torch.from_numpy(values), grid)).numpy()
    found = search_float_groups(values, nearest, small, rule_of(grid), grid.height)
    for rows in (16, 32):
        blocks = rows // grid.height
        part = search_float_groups(values[rows:], nearest[blocks:], small, rule_of(grid), grid.height)
        np.testing.assert_array_equal(part, found[blocks:])


@pytest.mark.parametrize(("small", "levels"), [(E4M3, ordered_codes.E4M3.levels), (E2M1, ordered_codes.E2M1.levels)])
def test_a_value_has_the_nearest_level(small: SmallFloat, levels: tuple[float, ...]) -> None:
    """Every level, what lies beside every midpoint, and values beyond the last; ties go to the even code."""
    order = np.array(levels, np.float32)
    middles = (order[:-1] + order[1:]) / 2
    below, above = np.nextafter(middles, np.float32(-1e9)), np.nextafter(middles, np.float32(1e9))
    given = np.concatenate([order, below, above, np.array([-1e30, 1e30, 0], np.float32)])
    expected = np.concatenate([order, order[:-1], order[1:], order[[0, -1]], np.zeros(1, np.float32)])
    found = np.array([mse_float_scales._nearest(np.float32(value), small.levels) for value in given])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("global_scale", [16.0, 256.0, 4096.0])
def test_scales_of_nvfp4_are_stored_alike_on_tensors_and_arrays(global_scale: float) -> None:
    steps = np.concatenate([np.array([0, 1e-30, 1e30], np.float32), np.geomspace(1e-7, 100, 5000, dtype=np.float32)])
    ours = float4.nvfp4_steps(float4.nvfp4_scales(steps[None], global_scale), global_scale)
    theirs = e4m3_scales(global_scale)(torch.from_numpy(steps[None]))
    np.testing.assert_array_equal(ours, theirs.numpy())
    assert ours.max() == float8.LARGEST / global_scale
    assert (e4m3_scales(global_scale)(theirs) == theirs).all()
    assert e4m3_scales(global_scale)(torch.tensor([-1.0])) == 0.125 / global_scale


def test_scales_of_mxfp4_are_stored_alike_and_as_nearest_has_them() -> None:
    """Every positive bf16 absmax in a group of its own, and float32 steps beside the thresholds."""
    largest = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float().numpy()
    rows = np.repeat(largest[:, None], 32, axis=1)
    nearest = float4.mxfp4_steps(float4.fit_mxfp4(rows, 32))[:, 0]
    normal = largest >= 2.0**-120  # below, a sixth of it loses its bits
    sixths = largest / np.float32(6)
    np.testing.assert_array_equal(float4.mxfp4_steps(float4.mxfp4_exponents(sixths))[normal], nearest[normal])
    powers = np.ldexp(np.float32(1), np.arange(-126, 127))
    steps = np.concatenate([sixths, powers, powers * np.float32(7 / 6), np.nextafter(powers, np.float32(0))])
    ours = float4.mxfp4_steps(float4.mxfp4_exponents(steps))
    np.testing.assert_array_equal(power_of_two_scales(torch.from_numpy(steps)).numpy(), ours)
    np.testing.assert_array_equal(float4.mxfp4_steps(float4.mxfp4_exponents(ours)), ours)
    assert power_of_two_scales(torch.tensor([-1.0])) == 2.0**-127


def test_the_absmax_of_int8_is_the_rows_own_where_none_is_better() -> None:
    values = random_values(9, 64)
    values[2:5] = np.round(values[2:5] / np.abs(values[2:5]).max(1, keepdims=True) * 127)
    values[2:5, 0] = 127
    values[6] = 0
    largest = np.abs(values).max(1, keepdims=True)
    found = llm_int8.searched_absmax(values, largest)
    np.testing.assert_array_equal(found[2:5], largest[2:5])
    assert found[6] == 0
    assert (found != largest).any()
    codes, clipped = np.empty(values.shape, np.int8), np.clip(values, -found, found)
    llm_int8.encode(clipped, found, codes)
    decoded = np.empty_like(values)
    llm_int8.decode(codes, found, decoded)
    assert np.abs(codes.astype(int)).max() == 127
    assert np.square(values - decoded).sum() < 0.999 * np.square(values - _nearest_int8(values, largest)).sum()


def _nearest_int8(values: Any, largest: Any) -> Any:
    codes, decoded = np.empty(values.shape, np.int8), np.empty_like(values)
    llm_int8.encode(values, largest, codes)
    llm_int8.decode(codes, largest, decoded)
    return decoded
