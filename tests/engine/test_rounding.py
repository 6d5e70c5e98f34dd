"""Roundings without data, through the engine: dithering onto weights and onto stored codes, searched scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlora_export.drift.survival import survival
from qlora_export.engine import BuildOptions, build
from qlora_export.planning.make import make_plan
from qlora_export.planning.plan import Plan
from qlora_export.recipe.config import Recipe
from tests.helpers.files import edit_tensors, folder_bytes
from tests.helpers.pico import RecipeMaker, save_adapter
from tests.helpers.zoo import save_variant

DITHERED = {"format": "nf4", "rounding": "dithered"}
NEAREST = {"format": "nf4", "rounding": "nearest"}
UNTOUCHED = "model.layers.1.mlp.up_proj.weight"
TOUCHED = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def small(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small delta on two projections of each layer."""
    place = tmp_path_factory.mktemp("small") / "adapter"
    return save_adapter(pico_base, place, seed=5, size=0.002, target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def stored_base(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico base as bitsandbytes stores it, double quantised."""
    folder = tmp_path_factory.mktemp("stored") / "base"
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        pico_base, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    return folder


def made(recipe: Recipe, out: Path, **options: Any) -> Plan:
    plan = make_plan(recipe, out)
    build(plan, out, BuildOptions(**options))
    return plan


def parts(out: Path, name: str) -> dict[str, bytes]:
    tensors = load_file(out / name / "model.safetensors")
    return {key: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for key, tensor in tensors.items()}


def test_without_a_delta_the_bytes_are_those_of_training(
    pico_base: Path, pico_recipe: RecipeMaker, tmp_path: Path
) -> None:
    adapter = save_adapter(pico_base, tmp_path / "zero", seed=5, size=0)
    recipe = pico_recipe(DITHERED, "nf4-adapter", adapter=str(adapter), merge={"zero_delta": "keep"})
    plan = made(recipe, tmp_path)
    assert plan.artifacts[0].rounding.chosen == "dithered"
    assert parts(tmp_path, "nf4-dithered") == parts(tmp_path, "nf4-adapter")


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_what_the_adapter_leaves_alone_keeps_its_bytes(
    pico_base: Path, small: Path, pico_recipe: RecipeMaker, tmp_path: Path, variant: str
) -> None:
    adapter = small
    if variant == "dora":
        chosen = {"target_modules": ["q_proj"], "use_dora": True}
        adapter = save_adapter(pico_base, tmp_path / "dora", seed=6, size=0.002, **chosen)
    made(pico_recipe("nf4", "nf4-adapter", adapter=str(adapter)), tmp_path)
    dithered, trained = parts(tmp_path, "nf4"), parts(tmp_path, "nf4-adapter")
    kept = [name for name in dithered if name.startswith(UNTOUCHED)]
    assert len(kept) == 6
    assert all(dithered[name] == trained[name] for name in kept)
    codes, before = (np.frombuffer(found[TOUCHED], np.uint8) for found in (dithered, trained))
    assert 0 < (codes != before).mean() < 0.2


def test_dithered_codes_are_the_nearest_of_the_original_merge(
    small: Path, pico_recipe: RecipeMaker, tmp_path: Path
) -> None:
    original = {**NEAREST, "onto": "original", "name": "original"}
    plan = made(pico_recipe("nf4", original, adapter=str(small)), tmp_path)
    dithered, nearest = parts(tmp_path, "nf4"), parts(tmp_path, "original")
    assert dithered[TOUCHED] == nearest[TOUCHED]
    manifest = json.loads((tmp_path / "nf4/manifest.json").read_text())
    assert manifest["onto"] == "as-trained"
    assert manifest["rounding"] == {"stated": None, "chosen": "dithered", "seed": None}
    assert any(note.startswith("nf4 is dithered: rounding to nearest would keep") for note in plan.assumptions)


def test_a_large_delta_is_rounded_to_nearest(pico_base: Path, pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    adapter = save_adapter(pico_base, tmp_path / "large", seed=5, size=1.0)
    plan = made(pico_recipe(DITHERED, NEAREST, adapter=str(adapter)), tmp_path)
    assert [item.rounding.chosen for item in plan.artifacts] == ["nearest", "nearest"]
    assert parts(tmp_path, "nf4-dithered") == parts(tmp_path, "nf4-nearest")
    manifest = json.loads((tmp_path / "nf4-dithered/manifest.json").read_text())
    assert manifest["rounding"] == {"stated": "dithered", "chosen": "nearest", "seed": None}
    assert any(note.startswith("nf4-dithered is rounded to nearest, not dithered") for note in plan.assumptions)
    assert plan.warnings == ()


def test_a_delta_goes_onto_stored_codes_by_chance(
    stored_base: Path, pico_base: Path, pico_recipe: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Survival on average, the bytes of what has no delta, and the same bytes however the work is cut."""
    adapter = save_variant(pico_base, "llama", "lora", tmp_path / "adapter", seed=5)
    edit_tensors(adapter / "adapter_model.safetensors", _shrink)
    other = {**DITHERED, "seed": 1, "name": "other"}
    places = {"base": str(stored_base), "adapter": str(adapter)}
    recipe = pico_recipe(DITHERED, other, NEAREST, **places, merge={"zero_delta": "keep"})
    plan = made(recipe, tmp_path / "out", workers=3)
    assert [item.rounding.seed for item in plan.artifacts] == [0, 1, None]
    artifacts = build(plan, tmp_path / "out", BuildOptions())
    kept, _, erased = (
        np.mean([*survival(plan, item, artifact).values()])
        for item, artifact in zip(plan.artifacts, artifacts, strict=True)
    )
    assert kept == pytest.approx(1, abs=0.15)
    assert erased < 0.6
    shipped, base = parts(tmp_path / "out", "nf4-dithered"), load_file(stored_base / "model.safetensors")
    changed = [name for name in plan.model.changed if "q_proj" not in name]
    for name, tensor in base.items():
        if not any(name.startswith(adapted) for adapted in changed):
            found = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert shipped[name].rstrip() == found.rstrip(), name  # our states are padded
    assert shipped != parts(tmp_path / "out", "other")
    monkeypatch.setattr("qlora_export.merge.base_rows.BLOCK_WEIGHTS", 1)
    made(recipe, tmp_path / "cut", workers=1)
    assert folder_bytes(tmp_path / "cut") == folder_bytes(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/nf4-dithered", device_map={"": "cpu"})
    assert model.is_loaded_in_4bit


def _shrink(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name] *= 0.05 if "q_proj" not in name else 0.0


@pytest.mark.parametrize("form", ["nf4", "fp4", "w8a8", "w8a16"])
def test_searched_scales_are_nearer(
    small: Path, pico_recipe: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    formats: list[Any] = [{"format": form, "rounding": way, "onto": "original"} for way in ("nearest", "search")]
    recipe = pico_recipe({"format": "fp32", "onto": "original"}, *formats, adapter=str(small))
    plan = made(recipe, tmp_path / "out")
    merged = load_file(tmp_path / "out/fp32/model.safetensors")[TOUCHED].numpy()
    errors = []
    for item in plan.artifacts[1:]:
        route = item.routes[TOUCHED]
        raw = {name: np.frombuffer(data, np.uint8) for name, data in parts(tmp_path / "out", item.name).items()}
        assert route.form is not None
        found = route.form.decode(route.spec, raw, range(route.spec.rows))
        errors.append(float(np.square(found.reshape(merged.shape) - merged).sum()))
    assert errors[1] < errors[0] * (0.95 if form in ("nf4", "fp4") else 1)
    monkeypatch.setattr("qlora_export.merge.base_rows.BLOCK_WEIGHTS", 1)
    made(recipe, tmp_path / "cut", workers=2)
    assert folder_bytes(tmp_path / "cut") == folder_bytes(tmp_path / "out")
