"""What bitsandbytes does on a CPU that the reference must not do; should a release mend it, these tests say so."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16

from qlora_export.runtimes.loading import decoded_weight, pin_weights
from tests.helpers.values import random_values


def layer(rows: int, columns: int, compute: torch.dtype = torch.bfloat16) -> tuple[Any, torch.Tensor]:
    """A quantised Linear4bit and its weight decoded block by block, without bitsandbytes' fast kernels."""
    dense = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
    dense.weight.data = torch.from_numpy(random_values(rows, columns)).bfloat16()
    made = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, compute_dtype=compute, quant_type="nf4")
    made.load_state_dict(dense.state_dict())
    made = made.to("cpu")
    state = made.weight.quant_state
    absmax = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    packed = made.weight.data.reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: rows * columns].long()
    expected = (state.code[codes] * absmax.repeat_interleave(64)[: rows * columns]).reshape(rows, columns)
    return made, expected


@pytest.mark.parametrize("columns", [16, 48, 64, 88, 96, 100, 160])
def test_weights_are_decoded_with_the_absmax_of_their_own_block(columns: int) -> None:
    made, expected = layer(24, columns)
    assert torch.equal(decoded_weight(made, []), expected)
    assert torch.equal(decoded_weight(made, [torch.bfloat16]), expected.bfloat16().float())


def test_pinned_layers_multiply_in_float32_with_the_rounded_weight() -> None:
    made, expected = layer(32, 64)
    pin_weights(torch.nn.Sequential(made))
    inputs = torch.from_numpy(random_values(5, 64, seed=1))
    found = made.eval()(inputs)
    assert torch.equal(found, torch.nn.functional.linear(inputs, expected.bfloat16().float()))


@pytest.mark.skipif(not has_avx512bf16(), reason="only CPUs with AVX512-BF16 repack")
def test_without_the_pin_bitsandbytes_computes_in_bf16_with_repacked_weights() -> None:
    made, expected = layer(32, 64, torch.float32)
    inputs = torch.from_numpy(random_values(5, 64, seed=1, scale=1))
    exact = torch.nn.functional.linear(inputs, expected)
    made.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        unpacked = made.eval()(inputs)
        made.support_avx512bf16_for_cpu = True
        repacked = made.eval()(inputs)
    assert (unpacked - exact).abs().max() < 1e-6
    assert (repacked - exact).abs().max() > 1e-4
