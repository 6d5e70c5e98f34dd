from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from qlora_export.engine import BuildOptions, build
from qlora_export.errors import InputError
from qlora_export.planning.make import make_plan
from qlora_export.quant import double_quant, four_bit
from qlora_export.recipe.config import Recipe
from qlora_export.runtimes.as_trained import AsTrained, open_as_trained
from qlora_export.runtimes.registry import load_runtime
from qlora_export.sources.adapter import open_adapter
from qlora_export.sources.checkpoint import open_checkpoint
from qlora_export.sources.sidecar import absmax_sha256, read_sidecar, write_sidecar
from qlora_export.tensors.reading import SourceFiles
from qlora_export.training import record
from qlora_export.types import TrainedModule
from tests.helpers.files import edit_tensors
from tests.helpers.pico import RecipeMaker, load_qlora, save_adapter, save_base

TOKENS = [0, 2, 300, 301, 17, 1500, 9, 77]


@pytest.fixture(scope="module")
def live(pico_base: Path, pico_adapter: Path) -> AsTrained:
    return open_as_trained(open_checkpoint(pico_base), open_adapter(pico_adapter), read_sidecar(pico_adapter))


def test_it_is_the_training_step_in_float32(live: AsTrained, pico_base: Path, pico_adapter: Path) -> None:
    """In bf16, as training runs it, the live model differs from the reference by bf16 noise alone."""
    model = peft.PeftModel.from_pretrained(load_qlora(pico_base), pico_adapter).train()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TOKENS])).logits[0].float()
    noisy = torch.log_softmax(logits, -1).numpy()
    exact = live.tuned().log_probabilities(TOKENS)
    divergence = (np.exp(exact) * (exact - noisy)).sum(axis=1)
    assert 1e-9 < divergence.mean() < 1e-3


def test_base_and_merged_are_what_they_are_called(live: AsTrained) -> None:
    tuned = live.tuned().log_probabilities(TOKENS)
    with live.base() as session:
        base = session.log_probabilities(TOKENS)
    with live.merged() as session:
        merged = session.log_probabilities(TOKENS)
    again = live.tuned().log_probabilities(TOKENS)
    assert np.array_equal(tuned, again)
    assert np.abs(base - tuned).max() > 0.1
    assert 0 < np.abs(merged - tuned).max() < 0.05


@pytest.mark.parametrize("name", ["bf16", "nf4-adapter"])
def test_artifacts_compute_the_same_function(
    live: AsTrained, pico_recipe: RecipeMaker, tmp_path: Path, name: str
) -> None:
    """Our merged bytes against the live reference merged by torch; our NF4 folder with its adapter, bit for bit."""
    build(make_plan(pico_recipe(name), tmp_path), tmp_path, BuildOptions())
    with load_runtime("transformers").open(tmp_path / name) as session:
        found = session.log_probabilities(TOKENS)
    if name == "bf16":
        with live.merged() as session:
            expected = session.log_probabilities(TOKENS)
        assert np.abs(found - expected).max() < 2e-3
    else:
        assert np.array_equal(found, live.tuned().log_probabilities(TOKENS))


@pytest.mark.parametrize("storage", [torch.float16, torch.float32])
def test_a_base_stored_otherwise_than_computed(tmp_path: Path, storage: torch.dtype) -> None:
    """The weight of the reference is rounded as in training, whatever dtype the base was loaded in."""
    base = save_base(tmp_path / "base", seed=6, dtype=storage)
    adapter = save_adapter(base, tmp_path / "adapter", seed=7)
    record(load_qlora(base, storage), adapter)
    training = read_sidecar(adapter)
    assert training.weight_roundings == ("BF16",)
    assert training.storage_dtype == {torch.float16: "F16", torch.float32: "F32"}[storage]
    recipe = Recipe.model_validate(
        {"base": str(base), "adapter": str(adapter), "artifacts": [{"format": "nf4-adapter"}]}
    )
    build(make_plan(recipe, tmp_path / "out"), tmp_path / "out", BuildOptions())
    live = open_as_trained(open_checkpoint(base), open_adapter(adapter), training)
    with load_runtime("transformers").open(tmp_path / "out/nf4-adapter") as session:
        assert np.array_equal(session.log_probabilities(TOKENS), live.tuned().log_probabilities(TOKENS))
    config = json.loads((tmp_path / "out/nf4-adapter/config.json").read_text())
    assert config["dtype"] == str(storage).removeprefix("torch.")


def test_an_adapter_that_a_gpu_trained(pico_base: Path, adapter_copy: Path, tmp_path: Path) -> None:
    """CUDA searches the absmax codes exactly and sums their mean otherwise; the sidecar's state is reproduced."""
    checkpoint, training = open_checkpoint(pico_base), read_sidecar(adapter_copy)
    modules = {}
    with SourceFiles() as files:
        for name, module in training.modules.items():
            values = files.values(checkpoint.tensors[f"{name}.weight"]).reshape(-1)
            absmax = np.empty(-(-values.size // 64), np.float32)
            four_bit.block_absmax(values, 64, absmax)
            offset = np.float32(double_quant.mean(absmax) * np.float32(1.000001))
            codes, nested_absmax = double_quant.encode(absmax, offset, exact=True)
            modules[name] = TrainedModule(
                module.codes_sha256, absmax_sha256(codes, nested_absmax, offset), float(offset)
            )
    write_sidecar(adapter_copy, replace(training, exact_nested=True, modules=modules))
    artifacts = [{"format": "nf4-adapter"}, {"format": "bf16"}]
    recipe = Recipe.model_validate({"base": str(pico_base), "adapter": str(adapter_copy), "artifacts": artifacts})
    build(make_plan(recipe, tmp_path / "out"), tmp_path / "out", BuildOptions())
    live = open_as_trained(checkpoint, open_adapter(adapter_copy), read_sidecar(adapter_copy))
    with load_runtime("transformers").open(tmp_path / "out/nf4-adapter") as session:
        assert np.array_equal(session.log_probabilities(TOKENS), live.tuned().log_probabilities(TOKENS))


def test_another_base_than_in_training_is_refused(base_copy: Path, pico_adapter: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(base_copy / "model.safetensors", lambda tensors: tensors[name].neg_())
    with pytest.raises(InputError, match="layers.0.mlp.up_proj: bitsandbytes quantises this base"):
        open_as_trained(open_checkpoint(base_copy), open_adapter(pico_adapter), read_sidecar(pico_adapter))


def test_a_folder_that_does_not_load_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with (
        pytest.raises(InputError, match="transformers cannot load it"),
        load_runtime("transformers").open(tmp_path),
    ):
        pass


@pytest.mark.gpu
def test_on_a_gpu_the_models_say_what_they_say_on_the_cpu(pico_base: Path, pico_adapter: Path) -> None:
    checkpoint, adapter, training = open_checkpoint(pico_base), open_adapter(pico_adapter), read_sidecar(pico_adapter)
    here = open_as_trained(checkpoint, adapter, training)
    there = open_as_trained(checkpoint, adapter, training, device="cuda")
    assert np.abs(there.tuned().log_probabilities(TOKENS) - here.tuned().log_probabilities(TOKENS)).max() < 1e-4
    with here.merged() as one, there.merged() as other:
        assert np.abs(one.log_probabilities(TOKENS) - other.log_probabilities(TOKENS)).max() < 1e-4
    runtime = load_runtime("transformers")
    with runtime.open(pico_base) as one, runtime.open(pico_base, "cuda") as other:
        assert np.abs(one.log_probabilities(TOKENS) - other.log_probabilities(TOKENS)).max() < 1e-4
