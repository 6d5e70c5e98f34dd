"""compressed-tensors is the oracle: its compressor for every part, its config model for the table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams

from qlora_export.errors import InputError, UsageError
from qlora_export.formats.base import Format
from qlora_export.formats.registry import load_format
from qlora_export.types import Options, TensorSpec, TrainingQuantization
from tests.formats.test_contract import cuts, encode
from tests.helpers.values import random_values

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
NAMES = {torch.int32: "I32", torch.int64: "I64", torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}
NAMES |= {dtype: name for name, dtype in TORCH.items()}
CASES: list[tuple[str, Options]] = [
    *[("w4a16", {"group_size": size}) for size in (32, 64, 128)],
    *[("w4a16", {"group_size": size, "symmetric": False}) for size in (32, 64, 128)],
    ("w4a16", {}),
    ("w8a16", {}),
    ("w8a8", {}),
    ("fp8", {}),
    ("fp8-block", {}),
    ("nvfp4a16", {}),
    ("nvfp4a16", {"global_scale": 1024}),
    ("mxfp4a16", {}),
]
SHAPES = [(9, 128), (33, 384), (129, 640), (1, 128), (7, 256)]
GROUPED = ("w4a16", "fp8-block", "nvfp4a16", "mxfp4a16")
ODD_SHAPES = [(3, 5), (1, 1), (129, 88), (5, 333)]
PRESETS = {"w8a8": "INT8", "fp8": "FP8_DYNAMIC", "fp8-block": "FP8_BLOCK", "w4a16": "W4A16"}
PRESETS |= {"nvfp4a16": "NVFP4A16", "mxfp4a16": "MXFP4A16"}


def extremes(weight: torch.Tensor, arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest of what shares a scale."""
    if arguments.block_structure:
        height, width = arguments.block_structure
        rows = [[block.aminmax() for block in part.split(width, 1)] for part in weight.split(height)]
        return torch.tensor([[found.min for found in row] for row in rows], dtype=weight.dtype), torch.tensor(
            [[found.max for found in row] for row in rows], dtype=weight.dtype
        )
    groups = weight.unflatten(-1, (-1, arguments.group_size or weight.shape[1]))
    return groups.amin(-1), groups.amax(-1)


def oracle(form: Format, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state of a layer that the library compressed, by the settings that the format states."""
    config = QuantizationConfig.model_validate(form.quantization_config(["lm_head"]))
    scheme = config.config_groups["group_0"]
    stated = getattr(form, "global_scale", None)
    shared = {} if stated is None else {"weight_global_scale": torch.tensor([float(stated)])}
    scale, zero = calculate_qparams(*extremes(weight, scheme.weights), scheme.weights, *shared.values())
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero, **shared}
    compressed: dict[str, torch.Tensor] = BaseCompressor.get_value_from_registry(config.format).compress(state, scheme)
    return compressed


def decompressed(form: Format, state: dict[str, torch.Tensor]) -> torch.Tensor:
    config = QuantizationConfig.model_validate(form.quantization_config([]))
    compressor = BaseCompressor.get_value_from_registry(config.format)
    weight: torch.Tensor = compressor.decompress(state, config.config_groups["group_0"])["weight"]
    return weight


def assert_same(form: Format, values: Any, dtype: str) -> None:
    spec = TensorSpec("x.weight", "F32", values.shape)
    weight = torch.from_numpy(values).to(TORCH[form.dense_dtype])
    found = encode(form, spec, values.reshape(-1), cuts(form, spec, 3))
    expected = {f"x.{name}": tensor for name, tensor in oracle(form, weight).items()}
    parts = {part.name: part for part in form.parts(spec)}
    assert set(expected) == set(parts)
    for name, tensor in expected.items():
        assert (NAMES[tensor.dtype], tuple(tensor.shape)) == (parts[name].dtype, parts[name].shape), name
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
        assert found[name].tobytes() == flat.view(torch.uint8).numpy().tobytes(), name
    if "x.weight_zero_point" in parts and spec.rows <= 8:
        return  # compressed-tensors 0.20 cannot view the only word of a column as bytes
    decoded = torch.from_numpy(form.decode(spec, found, range(spec.rows)).reshape(values.shape))
    assert torch.equal(decoded.to(TORCH[form.dense_dtype]), decompressed(form, oracle(form, weight)))


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_parts_are_those_of_the_library(name: str, options: Options, dtype: str) -> None:
    """Every byte, dtype and shape, and the values that the library decodes."""
    form = load_format(name, TrainingQuantization(storage_dtype=dtype), options)
    for seed, shape in enumerate(SHAPES + (ODD_SHAPES if name not in GROUPED else [])):
        values = random_values(*shape, seed=seed)
        assert_same(form, values, dtype)
        values[0] = 0
        assert_same(form, np.abs(values), dtype)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_the_table_is_what_the_library_serialises(name: str, options: Options) -> None:
    stated = load_format(name, TrainingQuantization(), options).quantization_config(["lm_head", "model.a.b"])
    assert stated is not None
    config = QuantizationConfig.model_validate(stated)
    beside = {"version": "0.20.0", "sparsity_config": {}, "transform_config": {}}
    assert {**config.model_dump(), **beside} == stated
    assert config.quant_method == "compressed-tensors"
    assert config.ignore == ["lm_head", "model.a.b"]
    assert not config.requires_calibration_data()


@pytest.mark.parametrize("name", PRESETS)
def test_settings_are_those_of_the_preset(name: str) -> None:
    stated = load_format(name, TrainingQuantization()).quantization_config([])
    assert stated is not None
    scheme = QuantizationConfig.model_validate(stated).config_groups["group_0"]
    preset = preset_name_to_scheme(PRESETS[name], ["Linear"])
    assert scheme.weights.model_dump() == preset.weights.model_dump()
    assert scheme.input_activations == preset.input_activations


def test_a_short_group_and_a_conv1d_are_obstacles() -> None:
    form = load_format("w4a16", TrainingQuantization())
    spec = TensorSpec("x.weight", "BF16", (16, 88))
    assert form.obstacle(spec, False) == "88 columns are no multiple of the group of 128"
    for name in ("w8a16", "w8a8", "fp8"):
        form = load_format(name, TrainingQuantization())
        assert form.obstacle(spec, False) is None
        assert "Conv1D" in str(form.obstacle(spec, True))


@pytest.mark.parametrize("options", [{"group_size": 48}, {"group_size": True}, {"group_size": "no"}])
def test_options_that_are_out_of_range_are_refused(options: Options) -> None:
    with pytest.raises(UsageError, match="known: 32, 64, 128"):
        load_format("w4a16", TrainingQuantization(), options)


def test_unknown_options_are_refused_and_the_known_named() -> None:
    with pytest.raises(UsageError, match="w4a16 has no option 'groupsize'; known: group_size, symmetric"):
        load_format("w4a16", TrainingQuantization(), {"groupsize": 64})
    with pytest.raises(UsageError, match="w4a16: symmetric 'no'; known: true, false"):
        load_format("w4a16", TrainingQuantization(), {"symmetric": "no"})
    with pytest.raises(UsageError, match="fp8 has no options"):
        load_format("fp8", TrainingQuantization(), {"group_size": 64})


@pytest.mark.parametrize("name", ["w4a16", "fp8"])
def test_a_value_beyond_the_dtype_is_refused_by_name(name: str) -> None:
    form = load_format(name, TrainingQuantization(storage_dtype="F16"))
    spec = TensorSpec("x.weight", "F32", (1, 128))
    with pytest.raises(InputError, match="tensor x.weight holds 70000, which the model's dtype F16 cannot"):
        list(form.open(spec).encode(np.full(128, 70000, np.float32), 0))


def test_what_a_global_scale_cannot_hold_is_refused_with_one_that_can() -> None:
    form = load_format("nvfp4a16", TrainingQuantization())
    spec = TensorSpec("x.weight", "BF16", (1, 16))
    values = np.full(16, 10.5, np.float32)
    assert form.decode(spec, encode(form, spec, values, [0, 1]), range(1))[0] == 10.5
    with pytest.raises(
        InputError, match="x.weight holds 11, nvfp4a16 with a global scale of 256 ends at 10.5"
    ) as caught:
        list(form.open(spec).encode(values + 0.5, 0))
    assert caught.value.hint == "options: {global_scale: 128} for this artifact"
    with pytest.raises(InputError, match="holds 1000, ") as caught:
        list(form.open(spec).encode(values * 0 + 1000, 0))
    assert caught.value.hint == "`keep` the module dense for this artifact"
    for wrong in (255, 8, True, "256"):
        with pytest.raises(UsageError, match="known: 16, 32, 64"):
            load_format("nvfp4a16", TrainingQuantization(), {"global_scale": wrong})
