"""The kernels on torch tensors against those of `quant/`, byte for byte: on a CPU here, on CUDA where there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qlora_export.quant import four_bit
from qlora_export.quant.device import kernels
from qlora_export.quant.floats import Float32
from qlora_export.tensors.dtypes import narrow, round_to, widen
from tests.helpers.values import random_values

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = [1, 63, 64, 65, 4096, 100_003]


def there(values: Float32, device: str) -> Any:
    return torch.from_numpy(values.copy()).to(device)


def awkward(size: int) -> Float32:
    """Random values with zeros, a block of nothing else, tiny and huge ones, and values on midpoints."""
    values = random_values(size, seed=size)
    values[: size // 4 : 7] = 0
    values[64:128] = 0
    values[128:140] *= np.float32(1e-30)
    values[140:150] *= np.float32(1e30)
    if size > 300:
        values[192:256] = 0
        values[192] = 1
        values[193:208] = four_bit.NF4.midpoints
    return values


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grid", four_bit.GRIDS.values(), ids=four_bit.GRIDS)
@pytest.mark.parametrize("size", SIZES)
def test_codes_and_values(device: str, grid: four_bit.FourBitGrid, size: int) -> None:
    values = awkward(size)
    absmax, found = (np.empty(-(-size // 64), np.float32) for _ in range(2))
    four_bit.block_absmax(values, 64, absmax)
    kernels.block_absmax(there(values, device), 64, found)
    assert found.tobytes() == absmax.tobytes()
    codes = kernels.encode_four_bit(there(values, device), absmax, 64, grid)
    assert codes.tobytes() == kernels.encode_four_bit(values, absmax, 64, grid).tobytes()
    scales = absmax * np.float32(1.01)
    decoded = kernels.round_trip(there(values, device), absmax, scales, 64, grid)
    expected = kernels.round_trip(values, absmax, scales, 64, grid)
    assert kernels.to_host(decoded).tobytes() == expected.tobytes()


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_rows(device: str) -> None:
    bits = narrow(awkward(5000), "BF16").view(np.uint16)
    tensor = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).to(device)
    assert kernels.to_host(kernels.widen(tensor)).tobytes() == widen(bits.view(np.uint8), "BF16").tobytes()
    absmax, found = (np.empty(-(-bits.size // 64), np.float32) for _ in range(2))
    kernels.block_absmax(bits, 64, absmax)
    kernels.block_absmax(tensor, 64, found)
    assert found.tobytes() == absmax.tobytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_rounding(device: str, dtype: str) -> None:
    values = awkward(3000)
    assert narrow(there(values, device), dtype).tobytes() == narrow(values.copy(), dtype).tobytes()
    rounded = kernels.to_host(round_to(there(values, device), dtype))
    assert rounded.tobytes() == round_to(values.copy(), dtype).tobytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(1, 1, 1), (7, 100, 3), (64, 1100, 16), (5, 512, 33)])
def test_low_rank_sums(device: str, rows: int, columns: int, rank: int) -> None:
    values = random_values(rows, columns, seed=1)
    left, right = random_values(rows, rank, seed=2), random_values(rank, columns, seed=3)
    tensor = there(values, device)
    kernels.add_low_rank(values, right, left, np.float32(0.3))
    kernels.add_low_rank(tensor, right, left, np.float32(0.3))
    assert kernels.to_host(tensor).tobytes() == values.tobytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_is_seen(device: str, bad: float) -> None:
    values = random_values(1000)
    assert kernels.all_finite(there(values, device))
    values[777] = bad
    assert not kernels.all_finite(there(values, device))
