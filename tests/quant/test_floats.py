from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_export.quant.floats import all_finite
from qlora_export.tensors.dtypes import narrow, round_to, widen

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
floats = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40)


@pytest.mark.parametrize("dtype", TORCH)
@given(values=floats)
def test_narrowing_rounds_as_torch_does(dtype: str, values: list[float]) -> None:
    array = np.array(values, np.float32)
    expected = torch.from_numpy(array).to(TORCH[dtype])
    assert narrow(array, dtype).tobytes() == expected.view(torch.uint8).numpy().tobytes()
    np.testing.assert_array_equal(round_to(array.copy(), dtype), expected.float().numpy())


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_16_bit_pattern_survives_widening(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = widen(bits.view(np.uint8), dtype)
    expected = torch.from_numpy(bits.view(np.int16)).view(TORCH[dtype]).float().numpy()
    np.testing.assert_array_equal(values, expected)
    finite = np.isfinite(values)
    assert narrow(values[finite], dtype).view(np.uint16).tolist() == bits[finite].tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_value_is_seen(bad: float) -> None:
    values = np.zeros(1000, np.float32)
    assert all_finite(values.view(np.uint32))
    values[777] = bad
    assert not all_finite(values.view(np.uint32))
