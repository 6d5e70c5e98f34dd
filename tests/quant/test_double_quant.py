"""bitsandbytes is the oracle for codes and map, torch with one thread for the mean."""

from __future__ import annotations

from collections.abc import Iterator

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from qlora_export.quant import double_quant
from tests.helpers.values import random_values


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_map_is_that_of_bitsandbytes() -> None:
    assert double_quant.dynamic_map().tobytes() == bnb.create_dynamic_map().numpy().tobytes()


@pytest.mark.parametrize("sizes", [range(1, 200), [255, 1000, 4095, 4096, 4097], [32769, 100_003, 1_000_003]])
def test_the_mean_is_that_of_torch(sizes: list[int]) -> None:
    for size in sizes:
        values = np.abs(random_values(size, seed=size))
        assert float(double_quant.mean(values)) == torch.from_numpy(values).mean().item(), size


@pytest.mark.parametrize("size", [1, 2, 7, 255, 256, 257, 300_001])
def test_codes_and_decoded_absmax_are_those_of_bitsandbytes(size: int) -> None:
    absmax = np.abs(random_values(size, seed=size))
    offset = double_quant.mean(absmax)
    packed, state = bnb.quantize_blockwise(torch.from_numpy(absmax) - float(offset), blocksize=256)
    codes, nested_absmax = double_quant.encode(absmax, offset)
    assert codes.tobytes() == packed.numpy().tobytes()
    assert nested_absmax.tobytes() == state.absmax.numpy().tobytes()
    expected = bnb.dequantize_blockwise(packed, state) + float(offset)
    np.testing.assert_array_equal(double_quant.decode(codes, nested_absmax, offset), expected.numpy())


def test_constant_absmax_gives_zero_codes() -> None:
    absmax = np.full(300, 0.25, np.float32)
    codes, nested_absmax = double_quant.encode(absmax, np.float32(0.25))
    assert not codes.any()
    np.testing.assert_array_equal(double_quant.decode(codes, nested_absmax, np.float32(0.25)), absmax)


def test_exact_search_finds_the_nearest_where_the_table_misses_it() -> None:
    absmax = np.abs(random_values(100_000))
    offset = double_quant.mean(absmax)
    table, nested_absmax = double_quant.encode(absmax, offset)
    exact, _ = double_quant.encode(absmax, offset, exact=True)
    assert 0 < (table != exact).sum() < 1000
    errors = [np.abs(double_quant.decode(codes, nested_absmax, offset) - absmax) for codes in (exact, table)]
    assert (errors[0] <= errors[1] + 1e-9).all()


def test_a_slice_decodes_as_the_whole_does() -> None:
    absmax = np.abs(random_values(2000))
    offset = double_quant.mean(absmax)
    codes, nested_absmax = double_quant.encode(absmax, offset)
    whole = double_quant.decode(codes, nested_absmax, offset)
    np.testing.assert_array_equal(double_quant.decode(codes[700:900], nested_absmax, offset, 700), whole[700:900])
