"""4-bit folders of every architecture load in transformers and compute what they hold."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import bitsandbytes
import numpy as np
import pytest
import torch
import transformers

from qlora_export.drift.survival import survival
from qlora_export.engine import BuildOptions, build
from qlora_export.planning.make import make_plan
from qlora_export.recipe.load import make_recipe
from qlora_export.runtimes.as_trained import open_as_trained
from qlora_export.runtimes.registry import load_runtime
from qlora_export.runtimes.session import ModelSession
from tests.helpers.zoo import ARCHITECTURES, TOKENS, save_architecture, save_variant


@pytest.mark.parametrize("architecture", ["gemma3_multimodal", "gpt2", "mixtral", "llama"])
def test_a_layer_that_is_kept_dense_loads_dense(tmp_path: Path, architecture: str) -> None:
    """The skip list speaks the names of the live model, which are not always those of the file."""
    base = save_architecture(architecture, tmp_path / "base", seed=3, dtype=torch.bfloat16)
    adapter = save_variant(base, architecture, "lora", tmp_path / "adapter", seed=5)
    artifact = {"format": "nf4", "keep": ["*.0.self_attn.q_proj", "*.0.attn.c_attn"][architecture == "gpt2" :][:1]}
    data = {"base": str(base), "adapter": str(adapter), "artifacts": [artifact]}
    plan = make_plan(make_recipe(data, Path(), "test"), tmp_path / "out")
    build(plan, tmp_path / "out", BuildOptions())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/nf4", device_map={"": "cpu"})
    live = [name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    kept = [name for name in plan.training.quantised if fnmatch.fnmatch(name, artifact["keep"][0])]
    assert kept
    assert len(live) == len(plan.training.quantised) - len(kept)


@pytest.mark.sampled(1, per="architecture")
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"llama_classifier"}))
def test_folders_load_and_keep_what_was_trained(tmp_path: Path, architecture: str, variant: str) -> None:
    base = save_architecture(architecture, tmp_path / "base", seed=3, dtype=torch.bfloat16)
    adapter = save_variant(base, architecture, variant, tmp_path / "adapter", seed=5)
    data = {"base": str(base), "adapter": str(adapter), "artifacts": ["bf16", "nf4", "nf4-adapter"]}
    plan = make_plan(make_recipe(data, Path(), "test"), tmp_path / "out")
    artifacts = {artifact.name: artifact for artifact in build(plan, tmp_path / "out", BuildOptions())}
    assert plan.adapter is not None
    reference = open_as_trained(plan.checkpoint, plan.adapter, plan.live_training).tuned().log_probabilities(TOKENS)
    with load_runtime("transformers").open(tmp_path / "out/nf4-adapter") as session:
        assert np.abs(session.log_probabilities(TOKENS) - reference).max() < 1e-5
    for item in plan.artifacts:
        kept = survival(plan, item, artifacts[item.name])
        assert set(kept) == set(plan.model.changed)
        low, high = {"bf16": (0.95, 1.05), "nf4": (0.0, 1.6), "nf4-adapter": (1 - 1e-6, 1 + 1e-6)}[item.name]
        assert all(low <= value <= high for value in kept.values()), kept
    with load_runtime("transformers").open(tmp_path / "out/nf4") as session:
        assert isinstance(session, ModelSession)
        live = [module for module in session._model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
        found = session.log_probabilities(TOKENS)
    assert len(live) == len(plan.training.quantised)
    assert (np.exp(reference) * (reference - found)).sum(axis=1).mean() < 1.0
