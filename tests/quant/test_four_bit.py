"""bitsandbytes is the oracle, byte for byte."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from qlora_export.quant import four_bit
from qlora_export.tensors.dtypes import narrow, round_to
from tests.helpers.values import random_values

SHAPES = [(64, 256), (7, 100), (3, 3), (1, 1), (5, 64), (129, 65), (1000, 333)]


def encode(values: Any, block: int, grid: four_bit.FourBitGrid = four_bit.NF4) -> tuple[Any, Any]:
    absmax = np.empty(-(-values.size // block), np.float32)
    four_bit.block_absmax(values, block, absmax)
    codes = np.empty((values.size + 1) // 2, np.uint8)
    four_bit.encode(values, absmax, block, grid, codes)
    return codes, absmax


@pytest.mark.parametrize("grid", four_bit.GRIDS.values(), ids=four_bit.GRIDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [32, 64, 128, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_absmax_and_values_are_those_of_bitsandbytes(
    grid: four_bit.FourBitGrid, shape: tuple[int, int], block: int, dtype: Any
) -> None:
    weight = torch.from_numpy(random_values(*shape)).to(dtype)
    weight[0] = 0
    packed, state = bnb.quantize_4bit(weight, blocksize=block, quant_type=grid.name)
    values = weight.float().numpy().reshape(-1)
    codes, absmax = encode(values, block, grid)
    assert codes.tobytes() == packed.numpy().tobytes()
    assert absmax.tobytes() == state.absmax.numpy().tobytes()
    state.dtype, state.shape = torch.float32, torch.Size((1, weight.numel()))
    out = np.empty(weight.numel(), np.float32)
    four_bit.decode(codes, absmax, block, grid.codebook, out)
    np.testing.assert_array_equal(out, bnb.dequantize_4bit(packed, state).numpy().reshape(-1))
    again = np.full_like(out, np.nan)
    four_bit.round_trip(values, absmax, absmax, block, grid, again)
    np.testing.assert_array_equal(again, out)


@pytest.mark.parametrize("grid", four_bit.GRIDS.values(), ids=four_bit.GRIDS)
@pytest.mark.parametrize("size", [1, 63, 64, 65, 2048 * 3 + 100, 100_003])
def test_bits_of_bfloat16_give_what_their_values_give(grid: four_bit.FourBitGrid, size: int) -> None:
    values = round_to(random_values(size), "BF16")
    bits = narrow(values, "BF16").view(np.uint16)
    codes, absmax = encode(values, 64, grid)
    same_codes, same_absmax = encode(bits, 64, grid)
    assert codes.tobytes() == same_codes.tobytes()
    assert absmax.tobytes() == same_absmax.tobytes()
    scales = absmax * np.float32(1.01)
    of_values, of_bits = np.empty(size, np.float32), np.empty(size, np.float32)
    four_bit.round_trip(values, absmax, scales, 64, grid, of_values)
    four_bit.round_trip(bits, absmax, scales, 64, grid, of_bits)
    np.testing.assert_array_equal(of_bits, of_values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 100, 199])
def test_one_bad_value_shows_in_the_absmax_of_its_block(bad: float, position: int) -> None:
    values = random_values(200)
    values[position] = bad
    for source in (values, (values.view(np.uint32) >> 16).astype(np.uint16)):
        absmax = np.empty(4, np.float32)
        four_bit.block_absmax(source, 64, absmax)
        assert np.flatnonzero(~np.isfinite(absmax)).tolist() == [position // 64]


def test_values_on_a_midpoint_take_the_lower_code() -> None:
    values = np.zeros(64, np.float32)
    values[0] = 1
    values[1:16] = four_bit.NF4.midpoints
    packed, _ = bnb.quantize_4bit(torch.from_numpy(values), blocksize=64, quant_type="nf4")
    codes, _ = encode(values, 64)
    assert codes.tobytes() == packed.numpy().tobytes()
    assert [codes[position // 2] >> (4 if position % 2 == 0 else 0) & 15 for position in range(1, 16)] == [*range(15)]


def test_its_own_output_is_a_fixed_point() -> None:
    values = random_values(4096)
    codes, absmax = encode(values, 64)
    out = np.empty_like(values)
    four_bit.decode(codes, absmax, 64, four_bit.NF4.codebook, out)
    again, again_absmax = encode(out, 64)
    assert again.tobytes() == codes.tobytes()
    assert again_absmax.tobytes() == absmax.tobytes()
