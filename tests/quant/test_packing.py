"""compressed-tensors is the oracle, byte for byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import (
    PackedQuantizationCompressor,
    pack_to_int32,
    unpack_from_int32,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given
from hypothesis import strategies as st

from qlora_export.quant import integers, packing
from qlora_export.quant.integers import Grid
from tests.helpers.values import random_values

SHAPES = [(1, 1), (3, 7), (5, 8), (4, 31), (7, 64), (33, 129), (16, 1024), (8, 1), (9, 3)]


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> Any:
    half = 1 << (bits - 1)
    return np.random.default_rng(seed).integers(-half, half, (rows, columns)).astype(np.int8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_words_are_those_of_the_library(shape: tuple[int, int], bits: int) -> None:
    codes = random_codes(*shape, bits)
    expected = pack_to_int32(torch.from_numpy(codes), bits)
    packed = packing.pack(codes, bits)
    assert packed.shape == expected.shape
    assert packed.tobytes() == expected.numpy().tobytes()
    back = packing.unpack(packed, bits, codes.shape[1])
    assert back.tobytes() == unpack_from_int32(expected, bits, torch.Size(shape)).contiguous().numpy().tobytes()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_points_are_packed_down_the_rows_as_the_library_does(shape: tuple[int, int], bits: int) -> None:
    zeros = random_codes(*shape, bits)
    expected = pack_to_int32(torch.from_numpy(zeros), bits, packed_dim=0)
    packed = packing.pack_down(zeros, bits)
    assert packed.shape == expected.shape
    assert packed.tobytes() == expected.numpy().tobytes()
    assert packing.unpack_down(packed, bits, shape[0]).tobytes() == zeros.tobytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_row_blocks_have_the_bytes_of_the_whole(bits: int) -> None:
    codes = random_codes(40, 33, bits)
    rows = packing.CODES_PER_WORD[bits]
    blocks = [codes[start : start + rows] for start in range(0, 40, rows)]
    assert b"".join(packing.pack(block, bits).tobytes() for block in blocks) == packing.pack(codes, bits).tobytes()
    down = b"".join(packing.pack_down(block, bits).tobytes() for block in blocks)
    assert down == packing.pack_down(codes, bits).tobytes()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_is_stored_as_the_library_compresses_it(bits: int, symmetric: bool) -> None:
    """From the weight to the tensors of the file."""
    weight = torch.from_numpy(random_values(37, 384)).bfloat16()
    arguments = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=128)
    groups = weight.unflatten(-1, (-1, 128))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    expected = PackedQuantizationCompressor.compress(state, scheme)

    values, grid = weight.float().numpy(), Grid(bits, 128, symmetric)
    _, zeros = fitted = integers.fit(values, grid)
    codes = np.empty(values.shape, np.int8)
    integers.encode(values, *fitted, grid, codes)
    assert packing.pack(codes, bits).tobytes() == expected["weight_packed"].numpy().tobytes()
    assert ("weight_zero_point" in expected) is not symmetric
    if not symmetric:
        assert packing.pack_down(zeros, bits).tobytes() == expected["weight_zero_point"].numpy().tobytes()


@given(st.integers(1, 9), st.integers(1, 150), st.sampled_from([4, 8]), st.integers(0, 1 << 30))
def test_what_was_packed_comes_back(rows: int, columns: int, bits: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    back = packing.unpack(packing.pack(codes, bits), bits, codes.shape[1])
    assert back.tobytes() == codes.tobytes()
