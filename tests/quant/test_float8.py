"""torch is the oracle for codes, compressed-tensors for scales and rows, byte for byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given
from hypothesis import strategies as st

from qlora_export.quant import float8
from qlora_export.quant.scales import symmetric
from qlora_export.tensors.dtypes import narrow
from tests.helpers.values import random_values

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
CHANNEL = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
TENSOR = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="tensor")


def ours(values: Any, dtype: str, scales: Any = None) -> tuple[Any, Any, Any]:
    scales = float8.fit_e4m3(values, dtype) if scales is None else scales
    codes, out = np.empty(values.shape, np.uint8), np.empty(values.shape, np.float32)
    float8.encode_e4m3(values, scales, dtype, codes)
    float8.decode_e4m3(codes, scales, out)
    return scales, codes, out


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def assert_same(weight: torch.Tensor, dtype: str) -> None:
    scale, zero = calculate_qparams(weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True), CHANNEL)
    expected = quantize(weight, scale, zero, CHANNEL, dtype=torch.float8_e4m3fn)
    scales, codes, out = ours(weight.float().numpy(), dtype)
    assert narrow(scales.reshape(-1), dtype).tobytes() == raw(scale)
    assert codes.tobytes() == raw(expected)
    assert narrow(out.reshape(-1), dtype).tobytes() == raw(dequantize(expected, scale, None, CHANNEL))


def test_every_code_is_widened_as_torch_widens_it() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(float8.widen_e4m3(codes), expected)
    out = np.empty((1, 256), np.float32)
    float8.decode_e4m3(codes[None], np.ones((1, 1), np.float32), out)
    np.testing.assert_array_equal(out[0], expected)
    numbers = ~np.isnan(expected)
    assert out[0][numbers].tobytes() == expected[numbers].tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_float_has_the_code_of_torch(dtype: str) -> None:
    """Infinities included; zeros have lost their sign, as by the zero point that the library adds. NaN is NaN."""
    weight = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(TORCH[dtype]).reshape(64, 1024)
    expected = (weight.clamp(-448, 448) + 0).to(torch.float8_e4m3fn)
    _, codes, _ = ours(weight.float().numpy(), dtype, np.ones((64, 1), np.float32))
    numbers = ~weight.isnan().numpy()
    assert codes[numbers].tobytes() == expected.view(torch.uint8).numpy()[numbers].tobytes()
    assert set(codes[~numbers].tolist()) == {0x7F, 0xFF}


def test_float32_values_beside_every_midpoint_have_the_code_of_torch() -> None:
    values = float8.widen_e4m3(np.arange(127, dtype=np.uint8))
    middles = (values[:-1] + values[1:]) / 2
    ladder = np.concatenate(
        [values, middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1e3))]
    )
    weight = np.stack([ladder, -ladder]).astype(np.float32)
    _, codes, _ = ours(weight, "F32", np.ones((2, 1), np.float32))
    assert codes.tobytes() == raw((torch.from_numpy(weight).clamp(-448, 448) + 0).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (9, 333), (16, 1024)])
def test_scales_codes_and_values_are_those_of_the_library(shape: tuple[int, int], dtype: str) -> None:
    weight = torch.from_numpy(random_values(*shape)).to(TORCH[dtype])
    assert_same(weight, dtype)
    weight[0] = 0
    assert_same(weight, dtype)


@pytest.mark.parametrize("dtype", TORCH)
def test_weights_of_every_size_are_coded_as_the_library_codes_them(dtype: str) -> None:
    smallest, largest = torch.finfo(TORCH[dtype]).smallest_normal, torch.finfo(TORCH[dtype]).max
    powers = torch.linspace(np.log2(smallest) - 12, np.log2(largest) - 1, 400, dtype=torch.float64).exp2()[:, None]
    values = torch.from_numpy(random_values(400, 128, scale=1)).double().clamp(-1.9, 1.9)
    assert_same((values * powers).to(TORCH[dtype]), dtype)
    assert_same(torch.full((1, 128), largest, dtype=TORCH[dtype]), dtype)


@pytest.mark.parametrize(("dtype", "large", "tiny"), [("F16", 65504.0, 2.0**-24), ("BF16", 1792.0, 2.0**-133)])
def test_a_quotient_that_vanishes_in_the_dtype_has_no_sign(dtype: str, large: float, tiny: float) -> None:
    assert_same(torch.tensor([[large, -tiny, tiny, -1.0, -0.0]], dtype=TORCH[dtype]), dtype)


@pytest.mark.parametrize("dtype", TORCH)
def test_one_scale_for_the_tensor(dtype: str) -> None:
    weight = torch.from_numpy(random_values(8, 100)).to(TORCH[dtype])
    scale, zero = calculate_qparams(weight.amin(), weight.amax(), TENSOR)
    largest = np.abs(weight.float().numpy()).max(keepdims=True)
    scales = np.repeat(symmetric(largest, float8.LARGEST, dtype), 8, axis=0)
    _, codes, _ = ours(weight.float().numpy(), dtype, scales)
    assert codes.tobytes() == raw(quantize(weight, scale, zero, TENSOR, dtype=torch.float8_e4m3fn))


def test_row_blocks_have_the_bytes_of_the_whole() -> None:
    values = random_values(37, 100)
    whole = ours(values, "BF16")
    parts = [ours(values[start : start + 5], "BF16") for start in range(0, 37, 5)]
    for index, array in enumerate(whole):
        assert b"".join(part[index].tobytes() for part in parts) == array.tobytes()


@given(st.integers(0, 1 << 30), st.floats(1e-6, 1e6))
def test_the_error_is_at_most_a_sixteenth_of_a_value(seed: int, scale: float) -> None:
    """Or half a subnormal step of the row."""
    values = random_values(3, 64, seed=seed, scale=scale)
    scales, _, out = ours(values, "F32")
    assert (np.abs(out - values) <= np.maximum(np.abs(values) / 16, scales * 2.0**-10) * 1.0001).all()


def test_codes_are_a_fixed_point() -> None:
    scales, codes, out = ours(random_values(9, 200), "F32")
    assert ours(out, "F32", scales)[1].tobytes() == codes.tobytes()
