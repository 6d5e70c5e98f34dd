"""Bases that are stored quantised, and bases that training quantised, against the live model of PEFT."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qlora_export.engine import BuildOptions, build
from qlora_export.merge.module_names import names_of
from qlora_export.planning.make import make_plan
from qlora_export.planning.plan import Plan
from qlora_export.recipe.load import make_recipe
from qlora_export.runtimes.as_trained import open_as_trained
from qlora_export.sources.checkpoint import open_checkpoint
from qlora_export.tensors.reading import SourceFiles
from tests.helpers.files import edit_json, folder_bytes
from tests.helpers.zoo import ARCHITECTURES, TOKENS, oracle, reload_logits, save_architecture, save_variant

STORAGES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "nf4-stored-as-bf16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A base of an architecture, as bitsandbytes and transformers store it."""
    folder = tmp_path_factory.mktemp("stored")

    def make(architecture: str, storage: str) -> Path:
        plain, place = folder / architecture, folder / f"{architecture}-{storage}"
        if not plain.exists():
            save_architecture(architecture, plain, seed=3, dtype=torch.bfloat16)
        if storage == "plain" or place.exists():
            return plain if storage == "plain" else place
        config = transformers.BitsAndBytesConfig(**STORAGES[storage])
        model = transformers.AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
        )
        model.save_pretrained(place)
        return place

    return make


def built(base: Path, adapter: Path, out: Path, *formats: str, **changes: Any) -> Plan:
    data = {"base": str(base), "adapter": str(adapter), "artifacts": list(formats), **changes}
    plan = make_plan(make_recipe(data, Path(), "test"), out)
    build(plan, out, BuildOptions())
    return plan


def live_logits(plan: Plan) -> Any:
    """Log-probabilities of the live model of training."""
    assert plan.adapter is not None
    return open_as_trained(plan.checkpoint, plan.adapter, plan.live_training).tuned().log_probabilities(TOKENS)


def log_probabilities(logits: Any) -> Any:
    return torch.log_softmax(torch.from_numpy(logits[0]), -1).numpy()


@pytest.mark.parametrize("storage", STORAGES)
def test_stored_weights_are_decoded_to_the_last_bit(stored: Callable[[str, str], Path], storage: str) -> None:
    folder = stored("llama", storage)
    checkpoint = open_checkpoint(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, dtype=torch.bfloat16)
    compared = 0
    with SourceFiles() as files:
        for name, module in model.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                state = copy.copy(module.weight.quant_state)
                shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
                state.dtype = torch.float32
                expected = bitsandbytes.functional.dequantize_4bit(module.weight.data, state).reshape(shape)
            elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
                expected = bitsandbytes.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
            else:
                continue
            weight = checkpoint.weights[f"{name}.weight"]
            half = weight.spec.rows // 2 // weight.row_multiple * weight.row_multiple
            parts = [weight.rows(files, 0, half), weight.rows(files, half, weight.spec.rows - half)]
            assert np.array_equal(np.concatenate(parts).reshape(weight.spec.shape), expected.numpy()), name
            compared += 1
    assert compared == 14


@pytest.mark.sampled(1, per="storage")
@pytest.mark.parametrize("variant", ["lora", "dora", "modules_to_save", "embedding", "trainable_tokens"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_stored_base_is_used_as_it_is(
    stored: Callable[[str, str], Path], tmp_path: Path, storage: str, variant: str
) -> None:
    adapter = save_variant(stored("llama", "plain"), "llama", variant, tmp_path / "adapter", seed=5)
    plan = built(stored("llama", storage), adapter, tmp_path / "out", "fp32")
    assert plan.live_training.provenance == "base"
    assert "quantization_config" not in json.loads((tmp_path / "out/fp32/config.json").read_text())
    found = log_probabilities(reload_logits(tmp_path / "out/fp32", "llama", TOKENS))
    assert np.abs(found - live_logits(plan)).max() < 1e-5


@pytest.mark.parametrize("storage", ["nf4", "nf4-nested", "nf4-stored-as-bf16"])
def test_the_codes_of_a_stored_base_are_shipped_untouched(
    stored: Callable[[str, str], Path], tmp_path: Path, storage: str
) -> None:
    base = stored("llama", storage)
    adapter = save_variant(stored("llama", "plain"), "llama", "lora", tmp_path / "adapter", seed=5)
    built(base, adapter, tmp_path / "out", "nf4-adapter")
    shipped = load_file(tmp_path / "out/nf4-adapter/model.safetensors")
    for name, tensor in load_file(base / "model.safetensors").items():
        assert torch.equal(shipped[name].view(torch.uint8), tensor.view(torch.uint8)), name
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/nf4-adapter", device_map={"": "cpu"})
    assert isinstance(model.model.layers[0].self_attn.q_proj, bitsandbytes.nn.Linear4bit)


@pytest.mark.sampled(1, per="block")
@pytest.mark.parametrize("block", [(16, 16), (128, 128), (16, 48)])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_an_fp8_base_is_decoded_by_its_block_scales(tmp_path: Path, variant: str, block: tuple[int, int]) -> None:
    base = save_architecture("llama", tmp_path / "base", seed=3, dtype=torch.bfloat16)
    adapter = save_variant(base, "llama", variant, tmp_path / "adapter", seed=5)
    decoded = to_fp8(base, block)
    expected = oracle(decoded, adapter, "llama", TOKENS)
    built(base, adapter, tmp_path / "out", "fp32", merge={"onto": "original"})
    assert np.abs(reload_logits(tmp_path / "out/fp32", "llama", TOKENS) - expected.logits).max() < 1e-5


def to_fp8(base: Path, block: tuple[int, int]) -> Path:
    """Store the linear layers of a base in FP8 blocks, and beside it a plain base with the values they then have."""
    tensors = load_file(base / "model.safetensors")
    stored, decoded = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if "_proj" not in name:
            continue
        grid = [-(-size // step) for size, step in zip(tensor.shape, block, strict=True)]
        scales = torch.zeros(grid)
        codes = torch.zeros(tensor.shape, dtype=torch.float8_e4m3fn)
        for row in range(grid[0]):
            for column in range(grid[1]):
                place = (slice(row * block[0], (row + 1) * block[0]), slice(column * block[1], (column + 1) * block[1]))
                scale = tensor[place].float().abs().max() / 448
                scales[row, column] = scale
                codes[place] = (tensor[place].float() / scale).to(torch.float8_e4m3fn)
                decoded[name][place] = (codes[place].float() * scale).to(torch.bfloat16)
        stored[name], stored[f"{name}_scale_inv"] = codes, scales
    plain = base.parent / "decoded"
    plain.mkdir()
    (plain / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(decoded, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    edit_json(base / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": list(block)})
    return plain


@pytest.mark.sampled(1, per="architecture")
@pytest.mark.parametrize(
    ("architecture", "variant"),
    [
        *(
            (name, variant)
            for name in ("llama", "qwen2", "gpt2")
            for variant in ("lora", "dora", "rslora", "embedding")
        ),
        ("qwen2", "lora_bias"),
        ("qwen2", "bias_all"),
        ("llama", "modules_to_save"),
        ("qwen3", "lora"),
        ("qwen3", "trainable_tokens"),
        ("phi3", "dora"),
        ("gpt_neox", "modules_to_save"),
        ("falcon", "lora"),
        ("opt", "bias_lora_only"),
        ("mixtral", "parameters"),
        ("mixtral", "lora"),
        ("qwen3_moe", "all_linear"),
    ],
)
def test_a_base_that_training_quantised(
    stored: Callable[[str, str], Path], tmp_path: Path, architecture: str, variant: str
) -> None:
    """No sidecar: the usual is assumed, and it is what transformers does when it loads the base in 4 bits."""
    assert_as_trained(stored(architecture, "plain"), architecture, variant, tmp_path)


@pytest.mark.sampled(1, per="quantisation")
@pytest.mark.parametrize(("architecture", "variant"), [("gemma2", "dora"), ("gemma3", "lora"), ("llama", "lora")])
@pytest.mark.parametrize("quantisation", ["nf4,storage=float32", "nf4,double,storage=float32,skip=q_proj"])
def test_a_training_that_is_stated(tmp_path: Path, architecture: str, variant: str, quantisation: str) -> None:
    """A float32 base, so that Gemma's embedding scale is not rounded in the live model alone."""
    base = save_architecture(architecture, tmp_path / "base", seed=3)
    plan = assert_as_trained(base, architecture, variant, tmp_path, training_quantization=quantisation)
    assert plan.live_training.provenance == "stated"
    assert any("q_proj" in name for name in plan.training.quantised) == ("skip" not in quantisation)


def test_a_training_on_16_bit_weights(stored: Callable[[str, str], Path], tmp_path: Path) -> None:
    base = stored("llama", "plain")
    adapter = save_variant(base, "llama", "dora", tmp_path / "adapter", seed=6)
    built(base, adapter, tmp_path / "stated", "fp32", training_quantization="none")
    built(base, adapter, tmp_path / "original", "fp32", merge={"onto": "original"})
    weights = [load_file(tmp_path / place / "fp32/model.safetensors") for place in ("stated", "original")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def assert_as_trained(base: Path, architecture: str, variant: str, tmp_path: Path, **changes: Any) -> Plan:
    """The folder computes what the live model of training computes; the base stays as it is."""
    adapter = save_variant(base, architecture, variant, tmp_path / "adapter", seed=6)
    before = folder_bytes(base)
    plan = built(base, adapter, tmp_path / "out", "fp32", **changes)
    found = log_probabilities(reload_logits(tmp_path / "out/fp32", architecture, TOKENS))
    assert np.abs(found - live_logits(plan)).max() < 1e-5
    assert folder_bytes(base) == before
    return plan


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"llama_classifier"}))
def test_the_layers_that_bitsandbytes_quantises_are_known(
    stored: Callable[[str, str], Path], architecture: str
) -> None:
    """By names where the family is a plain one, through transformers elsewhere."""
    base = stored(architecture, "plain")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = ARCHITECTURES[architecture].auto.from_pretrained(
        base, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    live = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    for asked in ((), ("nothing.weight",)):
        names = names_of(open_checkpoint(base), False, asked)
        homes = names.architecture.places
        expected = {homes[f"{name}.weight"][0].tensor.removesuffix(".weight") for name in live}
        assert names.linear == expected
