"""Every variant on every architecture against PEFT itself: the merged tensors, and the logits of the written folder.

Each pair is run with all cases; else plain LoRA on every architecture, and each other variant on one that is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qlora_export.engine import BuildOptions, build
from qlora_export.planning.make import make_plan
from qlora_export.recipe.load import make_recipe
from tests.helpers.values import half_step
from tests.helpers.zoo import CELLS, PEFT_IS_WRONG, TOKENS, oracle, reload_logits, save_architecture, save_variant

Bases = Callable[[str], Path]
# What at least one case is run of: plain LoRA on an architecture, or another variant.
DRAWS = [(name if variant == "lora" else variant, name, variant) for name, variant in CELLS]


@pytest.fixture(scope="module")
def zoo_base(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """A float32 base of an architecture, made when it is asked for first."""
    folder = tmp_path_factory.mktemp("zoo")

    def base(name: str) -> Path:
        return folder / name if (folder / name).exists() else save_architecture(name, folder / name, seed=3)

    return base


def built(base: Path, adapter: Path, out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Our tensors of both dense formats."""
    data: dict[str, Any] = {"base": str(base), "adapter": str(adapter), "merge": {"onto": "original"}}
    recipe = make_recipe({**data, "artifacts": ["fp32", "bf16"]}, Path(), "test")
    build(make_plan(recipe, out), out, BuildOptions())
    return {name: load_file(out / name / "model.safetensors") for name in ("fp32", "bf16")}


@pytest.mark.sampled(1, per="draw")
@pytest.mark.parametrize(("draw", "architecture", "variant"), DRAWS)
def test_the_merge_is_pefts(zoo_base: Bases, tmp_path: Path, draw: str, architecture: str, variant: str) -> None:
    base = zoo_base(architecture)
    adapter = save_variant(base, architecture, variant, tmp_path / "adapter", seed=4)
    expected = oracle(base, adapter, architecture, TOKENS)
    ours = built(base, adapter, tmp_path / "out")
    assert ours["fp32"].keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert ours["fp32"][name].shape == tensor.shape, name
        largest = max(float(tensor.abs().max()), 1e-3)
        assert (ours["fp32"][name] - tensor).abs().max() <= 2e-6 * largest, name
        assert ((ours["bf16"][name].float() - tensor).abs() <= half_step(tensor)).all(), name
    logits = reload_logits(tmp_path / "out/fp32", architecture, TOKENS)
    assert np.abs(logits - expected.logits).max() < 1e-5


@pytest.mark.sampled(1, per="variant")
@pytest.mark.parametrize(("architecture", "variant"), PEFT_IS_WRONG)
def test_the_merge_is_the_live_model_where_pefts_is_not(
    zoo_base: Bases, tmp_path: Path, architecture: str, variant: str
) -> None:
    """PEFT merges both sides of a tied pair, or one of them twice; the live model is the oracle."""
    base = zoo_base(architecture)
    adapter = save_variant(base, architecture, variant, tmp_path / "adapter", seed=4)
    expected = oracle(base, adapter, architecture, TOKENS)
    built(base, adapter, tmp_path / "out")
    logits = reload_logits(tmp_path / "out/fp32", architecture, TOKENS)
    assert np.abs(logits - expected.logits).max() < 1e-5
