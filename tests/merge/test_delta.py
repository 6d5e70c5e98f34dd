from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_export.errors import InputError, Refused
from qlora_export.merge.delta import LowRankDelta, load_delta
from qlora_export.merge.homes import match_adapter
from qlora_export.sources.adapter import open_adapter
from qlora_export.sources.checkpoint import open_checkpoint
from qlora_export.tensors.reading import SourceFiles
from tests.conftest import edit_tensors, random_values

sizes = st.integers(1, 40)


@given(rows=sizes, columns=sizes, rank=st.integers(1, 9), cut=st.integers(0, 40))
def test_the_delta_is_the_scaled_product_however_it_is_cut(rows: int, columns: int, rank: int, cut: int) -> None:
    delta = LowRankDelta(random_values(rank, columns), random_values(rows, rank, seed=1), np.float32(1.5))
    cut = min(cut, rows)
    values = random_values(rows, columns, seed=2).reshape(-1)
    pieces = [values[: cut * columns].copy(), values[cut * columns :].copy()]
    delta.add(pieces[0], 0)
    delta.add(pieces[1], cut)
    whole = values.copy()
    delta.add(whole, 0)
    assert np.concatenate(pieces).tobytes() == whole.tobytes()
    expected = values + 1.5 * (delta.b.astype(np.float64) @ delta.a.astype(np.float64)).reshape(-1)
    np.testing.assert_allclose(whole, expected, rtol=1e-6, atol=1e-8)


def load(base: Path, adapter: Path) -> None:
    found, problems = match_adapter(open_adapter(adapter), open_checkpoint(base))
    assert problems == []
    with SourceFiles() as files:
        for adaptation in found.values():
            load_delta(adaptation, files)


def test_nan_in_the_adapter_is_named(pico_base: Path, adapter_copy: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"][1, 3] = float("nan")

    edit_tensors(adapter_copy / "adapter_model.safetensors", poison)
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.lora_A.weight has 1 values that are NaN"):
        load(pico_base, adapter_copy)


def test_a_delta_of_zero_is_refused(pico_base: Path, adapter_copy: Path) -> None:
    def erase(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"].zero_()

    edit_tensors(adapter_copy / "adapter_model.safetensors", erase)
    with pytest.raises(Refused, match=r"layers.0.mlp.up_proj.lora_B.weight is all zero"):
        load(pico_base, adapter_copy)
