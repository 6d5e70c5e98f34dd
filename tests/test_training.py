"""The sidecar tells what training did: checked against the live model and a base of every dtype."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from qlora_export import RunOptions, build, make_recipe
from qlora_export.errors import UsageError
from qlora_export.sources.sidecar import read_sidecar, write_sidecar
from qlora_export.training import QloraExportCallback, record, weight_roundings
from tests.helpers.pico import load_qlora


def test_what_is_recorded(pico_base: Path, pico_adapter: Path) -> None:
    training = read_sidecar(pico_adapter)
    assert (training.quant_type, training.block_size, training.double_quant) == ("nf4", 64, True)
    assert (training.storage_dtype, training.compute_dtype) == ("BF16", "BF16")
    assert len(training.modules) == 14
    assert "lm_head" not in training.modules
    assert set(training.versions) == {"transformers", "bitsandbytes", "peft", "torch"}


def test_it_comes_back_as_written(pico_adapter: Path, tmp_path: Path) -> None:
    training = read_sidecar(pico_adapter)
    write_sidecar(tmp_path, training)
    assert read_sidecar(tmp_path) == training


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("double", [True, False])
def test_with_and_without_peft_and_double_quantisation(
    pico_base: Path, tmp_path: Path, wrapped: bool, double: bool
) -> None:
    model = load_qlora(pico_base, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.float32)
    if wrapped:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = peft.prepare_model_for_kbit_training(model)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    record(model, tmp_path)
    training = read_sidecar(tmp_path)
    assert len(training.modules) == 14
    assert training.double_quant == double
    assert training.compute_dtype == "F32"
    assert training.base_sha256 is not None
    assert {module.nested_offset is None for module in training.modules.values()} == {not double}


def test_a_model_in_16_bit_has_nothing_to_record(pico_base: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(pico_base)
    with pytest.raises(UsageError, match="no 4-bit layer"):
        record(model, tmp_path)


def test_a_repacked_model_is_refused(pico_base: Path, tmp_path: Path) -> None:
    model: Any = load_qlora(pico_base)
    model.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UsageError, match="layers.0.mlp.up_proj: bitsandbytes repacked"):
        record(model, tmp_path)
    assert not (tmp_path / "qlora_export.json").exists()


def test_a_base_that_is_gone_is_recorded_as_unknown(pico_base: Path, tmp_path: Path) -> None:
    model = load_qlora(pico_base)
    model.config._name_or_path = "somebody/some-model"
    record(model, tmp_path)
    assert json.loads((tmp_path / "qlora_export.json").read_text())["base"] == {"headers_sha256": None}
    record(model, tmp_path, base=pico_base)
    assert read_sidecar(tmp_path).base_sha256 is not None


@pytest.mark.parametrize(
    ("storage", "compute", "version", "expected"),
    [
        ("BF16", "BF16", "0.45.1", ("BF16",)),
        ("F16", "BF16", "0.49.2", ("F16", "BF16")),
        ("F16", "BF16", "0.50.2", ("BF16",)),
        ("F32", "F16", "1.0.0.dev0", ("F16",)),
    ],
)
def test_roundings_follow_the_version(storage: str, compute: str, version: str, expected: tuple[str, ...]) -> None:
    assert weight_roundings(storage, compute, version) == expected


@pytest.mark.parametrize("storage", [torch.float16, torch.float32])
def test_this_bitsandbytes_trains_with_the_weight_rounded_once(pico_base: Path, storage: torch.dtype) -> None:
    """The claim behind `weight_roundings`: a training step multiplies with the weight in the compute dtype."""
    layer = load_qlora(pico_base, storage).model.layers[0].self_attn.q_proj.train()
    inputs = torch.eye(64, dtype=torch.bfloat16, requires_grad=True)
    seen = layer(inputs).detach().T.float()
    state = layer.weight.quant_state
    state.dtype = torch.float32
    import bitsandbytes

    exact = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
    assert torch.equal(seen, exact.bfloat16().float())


def test_the_trainer_writes_it_with_every_checkpoint(pico_base: Path, tmp_path: Path) -> None:
    """A real Trainer on the pico model: two checkpoints, each with adapter and sidecar, and a release of the last."""
    model = peft.get_peft_model(load_qlora(pico_base), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    rows = [{"input_ids": list(range(10, 26)), "labels": list(range(10, 26))} for _ in range(8)]
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.Trainer(model, options, train_dataset=rows, callbacks=[QloraExportCallback()]).train()
    for step in (2, 4):
        folder = tmp_path / f"run/checkpoint-{step}"
        assert len(read_sidecar(folder).modules) == 14
    recipe = make_recipe(
        {"base": str(pico_base), "adapter": str(tmp_path / "run/checkpoint-4"), "artifacts": ["bf16"]}, Path(), "test"
    )
    run = build(recipe, RunOptions(tmp_path / "out"))
    assert (tmp_path / "out/bf16/manifest.json").is_file()
    assert run.plan.live_training.recorded


def test_the_callback_refuses_a_model_that_is_not_quantised(pico_base: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(pico_base)
    with pytest.raises(UsageError, match="no 4-bit layer"):
        QloraExportCallback().on_train_begin(None, None, None, model=model)
