from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qlora_export.drift.survival import survival
from qlora_export.engine import BuildOptions, build
from qlora_export.planning.make import make_plan
from tests.helpers.files import edit_tensors
from tests.helpers.pico import RecipeMaker, save_adapter

NEAREST = {"format": "nf4", "rounding": "nearest"}


def survivals(recipe: Any, out: Path) -> dict[str, dict[str, float]]:
    plan = make_plan(recipe, out)
    artifacts = build(plan, out, BuildOptions())
    pairs = zip(plan.artifacts, artifacts, strict=True)
    return {item.name: survival(plan, item, artifact) for item, artifact in pairs}


def test_what_each_format_keeps(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    original = {"format": "nf4", "name": "nf4-original", "onto": "original"}
    found = survivals(pico_recipe("fp32", "bf16", NEAREST, "nf4-adapter", original), tmp_path)
    for name in ("fp32", "nf4-adapter"):
        assert len(found[name]) == 14
        assert all(value == pytest.approx(1, abs=1e-5) for value in found[name].values())
    assert all(value == pytest.approx(1, abs=1e-2) for value in found["bf16"].values())
    assert max(found["nf4-nearest"].values()) < 0.99


def test_a_small_delta_is_erased_by_nearest_rounding(pico_base: Path, pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    adapter = save_adapter(pico_base, tmp_path / "small", seed=5, size=0.001)
    found = survivals(pico_recipe(NEAREST, "nf4", "nf4-adapter", adapter=str(adapter)), tmp_path / "out")
    assert np.median([*found["nf4-nearest"].values()]) < 0.1
    assert np.median([*found["nf4"].values()]) == pytest.approx(1, abs=0.5)
    assert min(found["nf4-adapter"].values()) == pytest.approx(1, abs=1e-4)


def test_the_definition(pico_recipe: RecipeMaker, pico_adapter: Path, tmp_path: Path) -> None:
    """<shipped - base, delta> / |delta|^2, with the base taken from nf4-adapter's folder by bitsandbytes' rules."""
    found = survivals(pico_recipe("bf16", "fp32"), tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(pico_adapter / "adapter_model.safetensors")
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    delta = 2.0 * tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double()
    exact = load_file(tmp_path / "fp32/model.safetensors")[name].double()
    base = (exact - delta).bfloat16().double()
    shipped = load_file(tmp_path / "bf16/model.safetensors")[name].double()
    expected = ((shipped - base) * delta).sum() / (delta * delta).sum()
    assert found["bf16"][name] == pytest.approx(expected.item(), abs=1e-6)


def test_a_layer_lost_on_the_way_shows(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    """Survival reads the shipped bytes: an adapter halved beside its base is seen."""
    recipe = pico_recipe("nf4-adapter")
    plan = make_plan(recipe, tmp_path)
    (artifact,) = build(plan, tmp_path, BuildOptions())

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"].mul_(0.5)

    edit_tensors(tmp_path / "nf4-adapter/adapter/adapter_model.safetensors", halve)
    found = survival(plan, plan.artifacts[0], artifact)
    assert found["model.layers.1.mlp.up_proj.weight"] == pytest.approx(0.5, abs=1e-4)
    assert found["model.layers.0.mlp.up_proj.weight"] == pytest.approx(1, abs=1e-4)
