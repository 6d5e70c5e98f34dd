"""bitsandbytes is the oracle for every part, byte for byte but for the padding of the JSON."""

from __future__ import annotations

import json
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from qlora_export.catalog import load_format
from qlora_export.contracts import Format, TensorSpec, TrainedModule, TrainingQuantization
from tests.conftest import random_values
from tests.formats.test_contract import SHAPES, encode


def oracle(weight: torch.Tensor, block: int, double: bool, kind: str) -> dict[str, torch.Tensor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    packed, state = bnb.quantize_4bit(weight, blocksize=block, compress_statistics=double, quant_type=kind)
    torch.set_num_threads(threads)
    return {"": packed, **{f".{key}": value for key, value in state.as_dict(packed=True).items()}}


@pytest.mark.parametrize("shape", [*SHAPES, (512, 640)])
@pytest.mark.parametrize(("block", "double"), [(64, True), (64, False), (128, True)])
def test_parts_are_those_of_bitsandbytes(shape: tuple[int, int], block: int, double: bool) -> None:
    training = TrainingQuantization(block_size=block, double_quant=double)
    assert_same(load_format("nf4-adapter", training), shape, block, double, "nf4")


@pytest.mark.parametrize("shape", [*SHAPES, (512, 640)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_merged_weights_have_the_settings_of_training_scripts(shape: tuple[int, int], kind: str) -> None:
    """Blocks of 64 and double quantisation, whatever training had."""
    training = TrainingQuantization(block_size=128, double_quant=False)
    assert_same(load_format(kind, training), shape, 64, True, kind)


def assert_same(form: Format, shape: tuple[int, int], block: int, double: bool, kind: str) -> None:
    """Every part is the oracle's."""
    weight = torch.from_numpy(random_values(*shape)).bfloat16()
    spec = TensorSpec("x.weight", "BF16", shape)
    found: dict[str, Any] = encode(form, spec, weight.float().numpy().reshape(-1), [0, spec.rows])
    expected = oracle(weight, block, double, kind)
    shapes = {part.name.removeprefix("x.weight"): part.shape for part in form.parts(spec)}
    assert set(shapes) == set(expected)
    for suffix, tensor in expected.items():
        raw = found[f"x.weight{suffix}"].tobytes()
        if "quant_state" in suffix:
            assert json.loads(raw) == json.loads(tensor.numpy().tobytes())
            assert len(raw) % 8 == 0
        else:
            assert raw == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), suffix
            assert shapes[suffix] == tuple(tensor.shape)


def test_the_length_of_the_state_does_not_depend_on_the_weights() -> None:
    form: Any = load_format("nf4", TrainingQuantization())
    spec = TensorSpec("x.weight", "BF16", (640, 256))
    lengths = {len(form.state(spec, np.float32(offset))) for offset in (0, 1, -1.1754944e-38, 0.1, 3.4028235e38)}
    assert len(lengths) == 1


def test_the_recorded_mean_of_training_is_used_for_its_base_alone() -> None:
    values = random_values(64, 64).reshape(-1)
    recorded = TrainedModule("", "", 0.0421)
    training = TrainingQuantization(modules={"x": recorded}, provenance="sidecar")
    spec = TensorSpec("x.weight", "BF16", (64, 64))

    def offset(name: str) -> float:
        raw = encode(load_format(name, training), spec, values, [0, 64])
        return float(json.loads(raw["x.weight.quant_state.bitsandbytes__nf4"].tobytes())["nested_offset"])

    assert offset("nf4-adapter") == pytest.approx(0.0421)
    assert offset("nf4") != pytest.approx(0.0421)
