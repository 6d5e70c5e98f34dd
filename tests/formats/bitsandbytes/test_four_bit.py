"""bitsandbytes is the oracle for every part, byte for byte but for the padding of the JSON."""

from __future__ import annotations

import json
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from qlora_export.formats.base import Format
from qlora_export.formats.registry import load_format
from qlora_export.quant import double_quant
from qlora_export.types import StoredScales, TensorSpec, TrainedModule, TrainingQuantization
from tests.formats.test_contract import SHAPES, encode
from tests.helpers.values import random_values


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

    def offset(form: Format) -> float:
        raw = encode(form, spec, values, [0, 64])
        return float(json.loads(raw["x.weight.quant_state.bitsandbytes__nf4"].tobytes())["nested_offset"])

    nf4: Any = load_format("nf4", training)
    assert offset(load_format("nf4-adapter", training)) == pytest.approx(0.0421)
    assert offset(nf4.rounded("dithered", training, 0)) == pytest.approx(0.0421)
    assert offset(nf4) != pytest.approx(0.0421)


@pytest.mark.parametrize("training", [
    TrainingQuantization(block_size=128, double_quant=False),
    TrainingQuantization(block_size=32, exact_nested=True),
], ids=["blocks of 128", "on CUDA"])  # fmt: skip
def test_dithering_seals_by_the_rules_of_training(training: TrainingQuantization) -> None:
    spec, values = TensorSpec("x.weight", "BF16", (512, 640)), random_values(512, 640).reshape(-1)
    nf4: Any = load_format("nf4", training)
    made = [
        encode(form, spec, values, [0, 512])
        for form in (nf4.rounded("dithered", training, 0), load_format("nf4-adapter", training), nf4)
    ]
    dithered, trained, fresh = ({name: part.tobytes() for name, part in parts.items()} for parts in made)
    assert dithered == trained
    assert dithered != fresh


def test_stored_absmax_keep_their_bytes_but_where_a_scale_grows() -> None:
    """Codes next to each other stand for the same float32 here: only a copy brings them back."""
    spec = TensorSpec("x.weight", "BF16", (8, 64 * 100))
    stored = np.random.default_rng(3).integers(0, 256, 800).astype(np.uint8)
    second, offset = np.full(4, 1e-5, np.float32), np.float32(1)
    scales = double_quant.decode(stored, second, offset)
    nf4: Any = load_format("nf4", TrainingQuantization())
    form = nf4.rounded("dithered", TrainingQuantization(), 0)
    codes = np.full(spec.size // 2, 0xFF, np.uint8)

    def sealed(*grown: int) -> Any:
        encoder = form.open_on(spec, StoredScales(scales, stored, second, float(offset)))
        delta = np.zeros(spec.size, np.float32)
        delta[[64 * block for block in grown]] = 0.5
        list(encoder.dither(codes, delta, 0))
        return {piece.part: piece.data for piece in encoder.seal()}

    assert np.array_equal(sealed()["x.weight.absmax"], stored)
    found = sealed(300)
    raw = {name: data.view(np.uint8) for name, data in found.items()} | {"x.weight": codes}
    decoded = form.decode(spec, raw, range(8)).reshape(-1, 64)[:, 0]
    assert decoded[300] == pytest.approx(1.5, rel=1e-3)
    others = np.r_[0:256, 512:800]
    assert np.array_equal(found["x.weight.absmax"][others], stored[others])
    assert decoded[others] == pytest.approx(scales[others])
