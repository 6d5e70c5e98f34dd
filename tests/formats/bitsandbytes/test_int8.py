"""bitsandbytes is the oracle, byte for byte."""

from __future__ import annotations

import bitsandbytes
import numpy as np
import pytest
import torch

from qlora_export.errors import InputError
from qlora_export.formats.registry import load_format
from qlora_export.quant import floats, llm_int8
from qlora_export.quant.scales import absmax
from qlora_export.types import TensorSpec, TrainingQuantization
from tests.formats.test_contract import SHAPES, encode
from tests.helpers.values import random_values

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("shape", [*SHAPES, (512, 640)])
def test_parts_are_what_a_layer_of_bitsandbytes_saves(shape: tuple[int, int], dtype: str) -> None:
    """A layer that is quantised as transformers does it: moved to its device with the weight of the saved model."""
    form = load_format("int8", TrainingQuantization(storage_dtype=dtype))
    values = random_values(*shape)
    values[0] *= 300
    spec = TensorSpec("x.weight", "F32", shape)
    layer = bitsandbytes.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bitsandbytes.nn.Int8Params(torch.from_numpy(values).to(TORCH[dtype]), requires_grad=False)
    saved = layer.to("cpu").state_dict(prefix="x.")
    found = encode(form, spec, values.reshape(-1), [0, spec.rows])
    parts = {part.name: part for part in form.parts(spec)}
    assert set(saved) == set(parts)
    for name, tensor in saved.items():
        assert tuple(tensor.shape) == parts[name].shape
        assert found[name].tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), name
    decoded = bitsandbytes.functional.int8_vectorwise_dequant(saved["x.weight"], saved["x.SCB"])
    np.testing.assert_array_equal(form.decode(spec, found, range(spec.rows)).reshape(shape), decoded.numpy())


def test_every_half_float_has_the_code_of_bitsandbytes() -> None:
    """Rows of all fp16 values of one octave under one absmax: quotients fall on and beside halves."""
    values = torch.arange(0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).reshape(31, 1024)
    weight = torch.cat([values, -values], dim=1)
    codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.clone())
    rows = weight.float().numpy()
    largest, found = np.empty((len(rows), 1), np.float32), np.empty(rows.shape, np.int8)
    absmax(rows, largest)
    llm_int8.encode(rows, largest, found)
    np.testing.assert_array_equal(largest[:, 0], scales.numpy())
    np.testing.assert_array_equal(found, codes.numpy())


def test_values_are_rounded_to_float16_as_torch_does() -> None:
    """Every bf16 value, and float32 values beside the midpoints of fp16."""
    wide = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    halves = torch.arange(0x7BFF, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    middles = ((halves[:-1] + halves[1:]) / 2).numpy()
    beside = [np.nextafter(middles, np.float32(side)) for side in (0, 1e6)]
    values = np.concatenate([wide[~wide.isnan()].numpy(), middles, -middles, *beside])
    expected = torch.from_numpy(values).half().float().numpy()
    floats.round_float16(values)
    np.testing.assert_array_equal(values, expected)


def test_a_row_of_zeros_has_codes_of_zero() -> None:
    form = load_format("int8", TrainingQuantization())
    spec = TensorSpec("x.weight", "BF16", (2, 3))
    found = encode(form, spec, np.array([0, 0, 0, 1, -2, 0.5], np.float32), [0, 2])
    assert found["x.weight"].view(np.int8).tolist() == [0, 0, 0, 64, -127, 32]
    assert form.decode(spec, found, range(1)).tolist() == [0, 0, 0]


def test_a_value_beyond_float16_is_refused_by_name() -> None:
    form = load_format("int8", TrainingQuantization())
    spec = TensorSpec("x.weight", "BF16", (1, 2))
    with pytest.raises(InputError, match=r"tensor x.weight holds 70000, int8 weights pass float16, up to 65504"):
        list(form.open(spec).encode(np.array([1, 70000], np.float32), 0))
