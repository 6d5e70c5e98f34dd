"""The search in numba against the one on torch tensors, and against rounding to nearest, which it never loses to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qlora_export.quant import four_bit, integers
from qlora_export.quant.integers import Grid
from qlora_export.quant.mse_scales import FRACTIONS, UNCHANGED, search_blocks, search_groups
from qlora_export.quant.rounding import scale_search
from qlora_export.quant.rounding.grid import Grid as TensorGrid
from qlora_export.quant.rounding.grid import sixteen_bit_scales
from qlora_export.tensors.dtypes import round_to
from tests.helpers.values import random_values

GRIDS = [Grid(4, 32), Grid(4, 128, dtype="F16"), Grid(8, None), Grid(4, 64, dtype="F32")]
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def errors(values: Any, scales: Any, levels: Any) -> Any:
    """Squared error [rows, groups] of the nearest levels, in float64."""
    groups = values.astype(np.float64).reshape(*scales.shape, -1)
    middles = (levels[:-1] + levels[1:]) / 2
    found = levels[np.searchsorted(middles, groups / scales[..., None])]
    return np.square(groups - found * scales[..., None]).sum(-1)


def by_tensors(values: Any, levels: Any, group: int, known: Any, dtype: torch.dtype) -> Any:
    grid = TensorGrid(tuple(levels.tolist()), group, sixteen_bit_scales(dtype))
    weights = torch.ones(values.shape[1])
    found = scale_search.search_scales(torch.from_numpy(values), weights, grid, torch.from_numpy(known))
    return grid.rule(found).numpy()


def test_the_fractions_are_those_of_the_search_on_tensors() -> None:
    assert FRACTIONS.tolist() == np.array(scale_search.FRACTIONS, np.float32).tolist()
    assert FRACTIONS[UNCHANGED] == 1


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scales_of_integers(grid: Grid) -> None:
    values = random_values(24, 384)
    values[3, :128] = 0
    nearest, zeros = integers.fit(values, grid)
    found = search_groups(values, nearest, zeros, grid)
    half = 1 << (grid.bits - 1)
    levels = np.arange(-half, half, dtype=np.float64)
    expected = by_tensors(values, levels, grid.group or 384, nearest, DTYPES[grid.dtype])
    least, plain = errors(values, found, levels), errors(values, nearest, levels)
    assert (least <= plain * (1 + 1e-6)).all()
    assert least.sum() < (0.9 if grid.bits == 4 else 0.99) * plain.sum()
    assert np.isclose(found, expected, rtol=1e-6).mean() > 0.97
    assert least.sum() == pytest.approx(errors(values, expected, levels).sum(), rel=1e-4)
    assert np.array_equal(search_groups(values[:5], nearest[:5], zeros[:5], grid), found[:5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 128])
def test_scales_of_integers_with_zero_points(size: int, dtype: str) -> None:
    """Against every fraction with its refits, group by group, in float64."""
    grid = Grid(4, size, False, dtype)
    values = random_values(24, 384) + np.float32(0.01)
    values[3, :128] = 0
    values[4] = np.abs(values[4])
    nearest, zeros = integers.fit(values, grid)
    found = search_groups(values, nearest, zeros, grid)
    assert np.array_equal(round_to(found.reshape(-1).copy(), dtype), found.reshape(-1)), "as it can be stored"
    plain, least = asymmetric_errors(values, nearest, zeros), asymmetric_errors(values, found, zeros)
    tried = [round_to((nearest * part).reshape(-1), dtype).reshape(nearest.shape) for part in FRACTIONS]
    best = np.min([asymmetric_errors(values, scales, zeros) for scales in tried], axis=0)
    assert (least <= np.minimum(plain, best) * (1 + 1e-4)).all()
    assert least.sum() < min(0.97 * plain.sum(), best.sum())
    assert np.array_equal(found[3, : 128 // size], nearest[3, : 128 // size])
    assert np.array_equal(search_groups(values[:5], nearest[:5], zeros[:5], grid), found[:5])


def asymmetric_errors(values: Any, scales: Any, zeros: Any) -> Any:
    """Squared error [rows, groups] of the nearest of 16 integers with a zero point, in float64."""
    groups, point = values.astype(np.float64).reshape(*scales.shape, -1), zeros[..., None].astype(np.float64)
    codes = np.clip(np.rint(groups / scales[..., None]), -8 - point, 7 - point)
    return np.square(groups - codes * scales[..., None]).sum(-1)


@pytest.mark.parametrize("levels", [four_bit.NF4, four_bit.FP4], ids=lambda levels: levels.name)
def test_scales_of_blocks(levels: four_bit.FourBitGrid) -> None:
    values = random_values(40, 192)
    values[3, :128] = 0
    flat, nearest = values.reshape(-1), np.empty(120, np.float32)
    four_bit.block_absmax(flat, 64, nearest)
    found = search_blocks(flat, nearest, 64, levels)
    expected = by_tensors(values, levels.levels, 64, nearest.reshape(40, 3), torch.float32).reshape(-1)
    inner = nearest > 0
    rows = flat.reshape(-1, 64)[inner]
    order = levels.levels.astype(np.float64)
    least, plain, theirs = (errors(rows, scales[inner], order) for scales in (found, nearest, expected))
    assert (least <= plain * (1 + 1e-6)).all()
    assert least.sum() < 0.92 * plain.sum()
    assert np.isclose(found, expected, rtol=1e-6).mean() > 0.95
    assert least.sum() == pytest.approx(theirs.sum(), rel=1e-3)
    assert np.array_equal(found[~inner], nearest[~inner])


def test_a_short_last_block_has_a_search_of_its_own() -> None:
    flat = random_values(3, 7).reshape(-1)
    nearest = np.empty(2, np.float32)
    four_bit.block_absmax(flat, 16, nearest)
    found = search_blocks(flat, nearest, 16, four_bit.NF4)
    last = np.empty(1, np.float32)
    four_bit.block_absmax(flat[16:], 16, last)
    assert found[1] == search_blocks(flat[16:], last, 16, four_bit.NF4)[0]
