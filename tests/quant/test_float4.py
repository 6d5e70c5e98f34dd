"""compressed-tensors is the oracle of every code and scale, byte for byte, for every bf16 value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from qlora_export.quant import float4
from qlora_export.quant.floats import Float32
from tests.helpers.values import random_values


def library(
    weight: torch.Tensor, name: str, global_scale: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the library makes of bf16 weights, and what it decodes that to."""
    scheme = preset_name_to_scheme(name, ["Linear"])
    groups = weight.unflatten(-1, (-1, scheme.weights.group_size))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights, global_scale)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    if global_scale is not None:
        state["weight_global_scale"] = global_scale
    form = {"NVFP4A16": "nvfp4-pack-quantized", "MXFP4A16": "mxfp4-pack-quantized"}[name]
    compressor = BaseCompressor.get_value_from_registry(form)
    made = compressor.compress(state, scheme)
    return made, compressor.decompress(made, scheme)["weight"]


def every_value() -> torch.Tensor:
    """All finite bf16 values in an order that brings far and near ones together."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = bits[bits.isfinite()]
    return torch.cat([finite, finite.flip(0)[::7], torch.zeros(64)])[: 2 * 31 * 1024].reshape(62, 1024).bfloat16()


WEIGHTS = {
    "heavy tails": torch.from_numpy(random_values(40, 256)).bfloat16(),
    "coarse": torch.from_numpy(np.random.default_rng(3).integers(-12, 13, (64, 128)) / 8).bfloat16(),
    "zeros": torch.zeros(3, 64).bfloat16(),
    "signed zeros": torch.tensor([[-0.0, 0.0, -1e-30, 1e-30] * 16]).bfloat16(),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("shared", [True, False])
def test_nvfp4(name: str, shared: bool) -> None:
    weight = WEIGHTS[name]
    scale = torch.tensor([256.0]) if shared else generate_gparam(weight.min(), weight.max())
    made, decoded = library(weight, "NVFP4A16", scale)
    rows = weight.float().numpy()
    scales = float4.fit_nvfp4(rows, 16, float(scale))
    np.testing.assert_array_equal(scales, made["weight_scale"].view(torch.uint8).numpy())
    steps = float4.nvfp4_steps(scales, float(scale))
    check(rows, steps, float4.NOTHING, made, decoded)


@pytest.mark.parametrize("name", [*WEIGHTS, "all"])
def test_mxfp4(name: str) -> None:
    weight = WEIGHTS[name] if name != "all" else every_value().clamp(-2.9e38, 2.9e38)  # beyond, it overflows
    made, decoded = library(weight, "MXFP4A16", None)
    rows = weight.float().numpy()
    scales = float4.fit_mxfp4(rows, 32)
    np.testing.assert_array_equal(scales, made["weight_scale"].numpy())
    check(rows, float4.mxfp4_steps(scales), float4.VANISHING_BFLOAT16, made, decoded)


def check(
    rows: Float32, steps: Float32, vanishing: np.float32, made: dict[str, torch.Tensor], decoded: torch.Tensor
) -> None:
    """Codes and decoded values are the library's."""
    codes, values = np.empty((len(rows), rows.shape[1] // 2), np.uint8), np.empty(rows.shape, np.float32)
    float4.encode(rows, steps, vanishing, codes)
    np.testing.assert_array_equal(codes, made["weight_packed"].numpy())
    float4.decode(codes, steps, float4.VALUES, values)
    np.testing.assert_array_equal(torch.from_numpy(values).bfloat16().float().numpy(), decoded.float().numpy())


def test_every_boundary_of_a_code() -> None:
    """The middles between levels and their neighbours under a step of one, in both signs."""
    middles = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6], np.float32)
    beside = [np.nextafter(middles, np.float32(side)) for side in (-9, 9)]
    places = np.concatenate([middles, *beside])
    values = np.concatenate([places, -places]).reshape(1, -1)
    codes = np.empty((1, values.size // 2), np.uint8)
    float4.encode(values, np.ones((1, 1), np.float32), float4.NOTHING, codes)
    found = np.stack([codes & 15, codes >> 4], 2).reshape(-1)
    expected = [0, 2, 2, 4, 4, 6, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5, 6, 7, 7]
    assert found.tolist() == expected + [8 | code for code in expected]
