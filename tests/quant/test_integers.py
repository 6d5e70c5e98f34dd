"""compressed-tensors is the oracle, byte for byte."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given
from hypothesis import strategies as st

from qlora_export.quant import integers
from qlora_export.quant.integers import Grid
from qlora_export.tensors.dtypes import narrow
from tests.helpers.values import random_values

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
GRIDS = [Grid(*choice) for choice in product([4, 8], [32, 128, None], [True, False], TORCH)]
SHAPES = {32: [(1, 32), (7, 96)], 128: [(1, 128), (5, 384), (33, 1152)], None: [(1, 1), (3, 7), (9, 333), (2, 4096)]}


def arguments(grid: Grid) -> QuantizationArgs:
    strategy = "channel" if grid.group is None else "group"
    return QuantizationArgs(
        num_bits=grid.bits, type="int", symmetric=grid.symmetric, strategy=strategy, group_size=grid.group
    )


def library(weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales, zero points, codes and values of compressed-tensors."""
    groups = weight.unflatten(-1, (-1, grid.group or weight.shape[1]))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments(grid))
    codes = quantize(weight, scale, zero, arguments(grid), dtype=torch.int8)
    return scale, zero, codes, dequantize(codes, scale, zero, arguments(grid))


def ours(values: Any, grid: Grid) -> tuple[Any, Any, Any, Any]:
    scales, zeros = integers.fit(values, grid)
    codes, out = np.empty(values.shape, np.int8), np.empty(values.shape, np.float32)
    integers.encode(values, scales, zeros, grid, codes)
    integers.decode(codes, scales, zeros, out)
    return scales, zeros, codes, out


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def assert_same(weight: torch.Tensor, grid: Grid) -> None:
    scales, zeros, codes, out = ours(weight.float().numpy(), grid)
    expected = library(weight, grid)
    assert narrow(scales.reshape(-1), grid.dtype).tobytes() == raw(expected[0])
    assert zeros.tobytes() == raw(expected[1])
    assert codes.tobytes() == raw(expected[2])
    rounded = torch.from_numpy(out).to(TORCH[grid.dtype])
    np.testing.assert_array_equal(rounded.float().numpy(), expected[3].float().numpy())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scales_zero_points_codes_and_values_are_those_of_the_library(grid: Grid) -> None:
    for seed, shape in enumerate(SHAPES[grid.group]):
        weight = torch.from_numpy(random_values(*shape, seed=seed)).to(TORCH[grid.dtype])
        assert_same(weight, grid)
        weight[0] = 0
        assert_same(weight, grid)
        assert_same(weight.abs(), grid)
        assert_same(-weight.abs() - 1, grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weights_of_every_size_are_coded_as_the_library_codes_them(grid: Grid) -> None:
    """Rows from far below the smallest normal number to the largest finite one."""
    dtype = TORCH[grid.dtype]
    smallest, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    powers = torch.linspace(np.log2(smallest) - 12, np.log2(largest) - 1, 400, dtype=torch.float64).exp2()[:, None]
    values = torch.from_numpy(random_values(400, 128, scale=1)).double().clamp(-1.9, 1.9)
    assert_same((values * powers).to(dtype), grid)
    assert_same(((values - 1) / 2 * powers).to(dtype), grid)
    assert_same(torch.full((1, 128), largest, dtype=dtype), grid)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.dtype != "F32"], ids=str)
def test_ties_are_broken_after_the_second_rounding(grid: Grid) -> None:
    """Every value of a few octaves under one scale: quotients fall on and beside halves."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(TORCH[grid.dtype])
    values = values[(values.abs() < 8) & (values.abs() > 1e-4)]
    weight = torch.nn.functional.pad(values, (0, -len(values) % 128)).reshape(-1, 128)
    assert_same(weight, grid)
    assert_same(weight.T.contiguous().reshape(-1, 128), grid)


@pytest.mark.parametrize("grid", [Grid(4, 128), Grid(8, None, False), Grid(8, 32, False, "F16")], ids=str)
def test_row_blocks_have_the_bytes_of_the_whole(grid: Grid) -> None:
    values = random_values(37, 384)
    whole = ours(values, grid)
    for rows in (1, 5, 36):
        parts = [ours(values[start : start + rows], grid) for start in range(0, 37, rows)]
        for index, array in enumerate(whole):
            assert b"".join(part[index].tobytes() for part in parts) == array.tobytes()


def test_a_short_group_is_refused_as_the_library_refuses_it() -> None:
    with pytest.raises(ValueError, match="200 columns are no multiple of the group of 128"):
        integers.fit(random_values(2, 200), Grid(4, 128))
    weight = torch.zeros(2, 200)
    with pytest.raises(ValueError, match="divisble"):
        quantize(weight, torch.ones(2, 2), torch.zeros(2, 2), arguments(Grid(4, 128)))


def test_nothing_is_coded_as_nothing() -> None:
    assert [part.shape for part in ours(np.empty((0, 128), np.float32), Grid(4, 128))] == [(0, 1), (0, 1)] + [
        (0, 128)
    ] * 2


@given(st.integers(0, 1 << 30), st.sampled_from([4, 8]), st.booleans(), st.floats(1e-6, 1e6))
def test_the_error_is_at_most_half_a_step(seed: int, bits: int, symmetric: bool, scale: float) -> None:
    """Symmetric grids: of what the highest code can reach, and one step at most beyond it."""
    values = random_values(3, 64, seed=seed, scale=scale)
    scales, _, codes, out = ours(values, Grid(bits, 32, symmetric, "F32"))
    step = np.repeat(scales, 32, axis=1)
    assert (np.abs(out - values) <= step * (0.5 if symmetric else 1.0) * 1.0001).all()
    assert codes.min() >= -(1 << (bits - 1))
    assert codes.max() < 1 << (bits - 1)
