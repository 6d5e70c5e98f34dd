"""What is said of single layers, against a naive computation from the files alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qlora_export.artifact import Artifact
from qlora_export.drift.changed_codes import different_codes
from qlora_export.drift.gate import DEFAULT_LIMITS, judge
from qlora_export.drift.layers import KeptLayer, lowest, summarised, with_calibration
from qlora_export.drift.results import Drift
from qlora_export.drift.survival import kept_layers
from qlora_export.engine import BuildOptions, build
from qlora_export.merge import base_rows
from qlora_export.pipeline import release as pipeline
from qlora_export.pipeline.options import RunOptions
from qlora_export.planning.make import make_plan
from qlora_export.planning.plan import Plan
from qlora_export.recipe.config import Limits
from qlora_export.recipe.load import make_recipe
from qlora_export.sources.sidecar import SIDECAR_NAME
from tests.drift.test_gate import PERFECT
from tests.helpers.files import edit_tensors
from tests.helpers.pico import load_qlora, save_adapter, save_base

ARTIFACTS: list[Any] = [
    "fp32",
    "bf16",
    {"format": "nf4", "rounding": "nearest", "name": "nearest"},
    {"format": "nf4", "rounding": "dithered", "name": "dithered"},
    {"format": "nf4", "rounding": "nearest", "onto": "original", "name": "original"},
    "fp4",
    "int8",
    "fp8",
    "nf4-adapter",
]
NF4 = ("nearest", "dithered", "original", "nf4-adapter")


class Released(NamedTuple):
    """A plan and its artifacts, and what bitsandbytes and the adapter's file say of every layer."""

    plan: Plan
    artifacts: dict[str, Artifact]
    codes: dict[str, torch.Tensor]
    trained: dict[str, torch.Tensor]
    original: dict[str, torch.Tensor]
    delta: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    """A base whose blocks run over row ends, the last of them short."""
    folder = tmp_path_factory.mktemp("kept")
    base = save_base(folder / "base", seed=1, hidden_size=40, intermediate_size=50, num_hidden_layers=1)
    adapter = save_adapter(base, folder / "adapter", seed=2, size=0.02)
    recipe = make_recipe({"base": str(base), "adapter": str(adapter), "artifacts": ARTIFACTS}, Path(), "test")
    plan = make_plan(recipe, folder / "out")
    artifacts = {artifact.name: artifact for artifact in build(plan, folder / "out", BuildOptions())}
    live, factors = load_qlora(base), load_file(adapter / "adapter_model.safetensors")
    codes, trained, delta = {}, {}, {}
    for name, module in live.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            absmax = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
            key, stem = f"{name}.weight", f"base_model.model.{name}"
            codes[key] = nibbles(module.weight.data, state.shape.numel())
            trained[key] = scaled(state.code[codes[key].long()], absmax, 64).bfloat16().double().reshape(state.shape)
            left, right = factors[f"{stem}.lora_B.weight"].double(), factors[f"{stem}.lora_A.weight"].double()
            delta[key] = 2 * left @ right
    original = {key: tensor.double() for key, tensor in load_file(base / "model.safetensors").items() if key in codes}
    return Released(plan, artifacts, codes, trained, original, delta)


def nibbles(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Codes one by one, the high nibble of a byte first."""
    return torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], 1).reshape(-1)[:count]


def scaled(values: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """Flat values times the scale of their block."""
    return values.float() * scales.float().repeat_interleave(block)[: values.numel()]


def shipped(tensors: dict[str, torch.Tensor], name: str, shape: torch.Size) -> torch.Tensor:
    """The values of a shipped weight, by its format's own definition."""
    weight = tensors[name]
    if (absmax := tensors.get(f"{name}.absmax")) is not None:
        (state,) = [tensors[key] for key in tensors if key.startswith(f"{name}.quant_state")]
        nested = scaled(tensors[f"{name}.nested_quant_map"][absmax.long()], tensors[f"{name}.nested_absmax"], 256)
        nested = nested + np.float32(json.loads(bytes(state.tolist()))["nested_offset"])
        codes = nibbles(weight, shape.numel()).long()
        return scaled(tensors[f"{name}.quant_map"][codes], nested, 64).bfloat16().double().reshape(shape)
    if (rows := tensors.get(name.replace(".weight", ".SCB"))) is not None:
        return (weight.float() * rows[:, None] / 127).bfloat16().double()
    if (rows := tensors.get(f"{name}_scale")) is not None:
        return (weight.float() * rows.float()).bfloat16().double()
    return weight.double()


@pytest.mark.parametrize("name", [item if isinstance(item, str) else item["name"] for item in ARTIFACTS])
def test_the_numbers_of_every_layer(released: Released, name: str) -> None:
    (item,) = [item for item in released.plan.artifacts if item.name == name]
    layers = kept_layers(released.plan, item, released.artifacts[name])
    tensors = load_file(released.artifacts[name].path / "model.safetensors")
    assert {layer.tensor for layer in layers} == set(released.delta)
    for layer in layers:
        base = (released.original if name == "original" else released.trained)[layer.tensor]
        delta = released.delta[layer.tensor]
        found = shipped(tensors, layer.tensor, base.shape) + (delta if name == "nf4-adapter" else 0)
        expected = ((found - base) * delta).sum() / (delta * delta).sum()
        assert layer.survival == pytest.approx(expected.item(), abs=1e-4), layer.tensor
        changed = None
        if name in NF4:
            codes = nibbles(tensors[layer.tensor], base.numel())
            changed = (codes != released.codes[layer.tensor]).double().mean().item()
        assert layer.codes_changed == changed, layer.tensor
    if name in ("dithered", "original"):
        assert all(layer.codes_changed for layer in layers)


@pytest.mark.parametrize("name", ["dithered", "int8"])
def test_rows_are_looked_at_block_by_block(released: Released, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (item,) = [item for item in released.plan.artifacts if item.name == name]
    whole = kept_layers(released.plan, item, released.artifacts[name])
    monkeypatch.setattr(base_rows, "BLOCK_WEIGHTS", 600)
    for layer, expected in zip(kept_layers(released.plan, item, released.artifacts[name]), whole, strict=True):
        assert layer.survival == pytest.approx(expected.survival, rel=1e-6)
        assert layer.codes_changed == expected.codes_changed


def test_codes_of_a_stored_base_are_those_of_training(released: Released, tmp_path: Path) -> None:
    """The base comes in NF4: what was stored is compared, also where all of it was dithered by chance."""
    base, recorded = tmp_path / "stored", released.plan.recipe.adapters[0].path
    adapter = shutil.copytree(recorded, tmp_path / "adapter", ignore=shutil.ignore_patterns(SIDECAR_NAME))
    load_qlora(released.plan.checkpoint.folder).save_pretrained(base)
    artifacts = [{"format": "nf4", "rounding": rounding, "name": rounding} for rounding in ("nearest", "dithered")]
    recipe = make_recipe({"base": str(base), "adapter": str(adapter), "artifacts": artifacts}, Path(), "test")
    plan = make_plan(recipe, tmp_path / "out")
    shares = {}
    for item, artifact in zip(plan.artifacts, build(plan, tmp_path / "out", BuildOptions()), strict=True):
        before, after = load_file(base / "model.safetensors"), load_file(artifact.path / "model.safetensors")
        for layer in kept_layers(plan, item, artifact):
            count = released.delta[layer.tensor].numel()
            trained, merged = (nibbles(tensors[layer.tensor], count) for tensors in (before, after))
            assert layer.codes_changed == (trained != merged).double().mean().item()
            shares[item.name, layer.tensor] = layer.codes_changed or 0.0
    assert all(shares["nearest", name] < shares["dithered", name] < 0.5 for name in released.delta)


@pytest.mark.parametrize(
    ("training", "rounding", "compared"),
    [
        ("nf4,block=128,double", "nearest", False),
        ("nf4,block=128,double", "dithered", True),
        ("none", "nearest", False),
    ],
)
def test_only_codes_in_the_blocks_of_training_are_compared(
    released: Released, tmp_path: Path, training: str, rounding: str, compared: bool
) -> None:
    adapter = save_adapter(released.plan.checkpoint.folder, tmp_path / "adapter", seed=2)
    (adapter / SIDECAR_NAME).unlink()
    data = {
        "base": str(released.plan.checkpoint.folder),
        "adapter": str(adapter),
        "training_quantization": training,
        "artifacts": [{"format": "nf4", "rounding": rounding}],
    }
    plan = make_plan(make_recipe(data, Path(), "test"), tmp_path / "out")
    (artifact,) = build(plan, tmp_path / "out", BuildOptions())
    layers = kept_layers(plan, plan.artifacts[0], artifact)
    assert {layer.codes_changed is not None for layer in layers} == {compared}


def test_an_erased_layer_is_named(released: Released) -> None:
    """The codes of the base, put where merged ones belong, are found and named by the gate."""
    name, erased = "dithered", "model.layers.0.mlp.up_proj.weight"
    (item,) = [item for item in released.plan.artifacts if item.name == name]
    base = load_file(released.artifacts["nf4-adapter"].path / "model.safetensors")
    path = released.artifacts[name].path / "model.safetensors"
    before = path.read_bytes()

    def erase(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: tensor for key, tensor in base.items() if key.startswith(erased)})

    try:
        edit_tensors(path, erase)
        layers = kept_layers(released.plan, item, released.artifacts[name])
    finally:
        path.write_bytes(before)
    assert lowest(layers, 2)[0] == KeptLayer(erased, 0.0, 0.0)
    drift = summarised(Drift(**PERFECT), layers)
    assert (drift.survival_min, drift.survival_min_tensor) == (0.0, erased)
    (reason,) = judge(drift, DEFAULT_LIMITS, 1000, 0).reasons
    assert reason == f"lowest survival is 0 in {erased}, the limit is at least 0.9"


@pytest.mark.parametrize("count", [1, 2, 67])
def test_codes_are_compared_one_by_one(count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(20):
        first, second = rng.integers(0, 16, count), rng.integers(0, 16, count)
        second[rng.random(count) < 0.5] = first[0]
        found = different_codes(packed(first.tolist(), 3), packed(second.tolist(), 12), count)
        assert found == int((first != second).sum())


def packed(codes: list[int], padding: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """As bitsandbytes packs, with something in the nibble that nothing needs."""
    whole = [*codes, padding] if len(codes) % 2 else codes
    return np.array([16 * high + low for high, low in zip(whole[::2], whole[1::2], strict=True)], np.uint8)


LAYERS = (KeptLayer("a", 1.1, 0.25), KeptLayer("b", 0.8, 0.5), KeptLayer("c", 0.9))
MEASURED = {
    "a": {"weighted_survival": 0.99, "output_error": 0.01, "gain": 1.1, "damping": 0.01},
    "b": {"weighted_survival": 1.02, "output_error": 0.02, "gain": 1.1, "damping": 0.01},
    "c": {"fallback": "no token reached it"},
}


def calibrated(**tuning: Any) -> tuple[KeptLayer, ...]:
    layers = {**MEASURED, "tuning": tuning} if tuning else MEASURED
    return with_calibration(LAYERS, {"calibration": {"layers": layers}})


def test_a_calibrated_artifact_knows_its_layers_in_their_outputs() -> None:
    found = calibrated()
    assert found == (
        KeptLayer("a", 1.1, 0.25, 0.99, 0.01, "shipped"),
        KeptLayer("b", 0.8, 0.5, 1.02, 0.02, "shipped"),
        LAYERS[2],
    )
    drift = summarised(Drift(**PERFECT), found)
    assert (drift.survival_median, drift.survival_min, drift.survival_min_tensor) == (0.9, 0.8, "b")
    assert drift.codes_changed_median == 0.375
    assert drift.weighted_survival_median == pytest.approx(0.99)
    assert (drift.weighted_survival_min, drift.weighted_survival_min_tensor) == (0.9, "c"), "it has no other number"


def test_calibration_names_the_layers_as_survival_does(
    pico_base: Path, pico_adapter: Path, pico_text: Path, tmp_path: Path
) -> None:
    data = {
        "base": str(pico_base),
        "adapter": str(pico_adapter),
        "artifacts": [{"format": "nf4", "rounding": "calibrated"}],
        "calibration": {"text": str(pico_text), "sequences": 4, "method": {"sweeps": 0, "delta_rounds": 1}},
    }
    run = pipeline.build(make_recipe(data, Path(), "test"), RunOptions(tmp_path))
    layers = kept_layers(run.plan, run.plan.artifacts[0], run.artifacts[0])
    assert len(layers) == 14
    for layer in layers:
        fallback = "down_proj" in layer.tensor  # 88 columns hold no whole number of blocks
        assert layer.weighted_of == (None if fallback else "shipped"), layer.tensor
        assert fallback or layer.weighted_survival == pytest.approx(1, abs=0.2), layer.tensor


def test_what_was_measured_before_tuning_is_marked_and_stands_for_the_artifact() -> None:
    found = calibrated(step=30, mean_kl_before_nats=0.2, mean_kl_after_nats=0.1)
    assert [layer.weighted_of for layer in found] == ["before tuning", "before tuning", None]
    drift = summarised(Drift(**PERFECT), found)
    assert drift.weighted_survival_min == min(layer.in_outputs for layer in found)
    assert calibrated(step=0) == calibrated(), "tuning that found nothing better changed nothing"


def test_calibrated_layers_are_judged_in_their_outputs() -> None:
    """What error feedback moves along inputs that rarely speak is not missing; layers without moments count plainly."""
    whole = KeptLayer("a", survival=0.2, weighted_survival=0.99, weighted_of="shipped")
    plain = KeptLayer("b", survival=0.95)
    drift = summarised(Drift(**PERFECT), (whole, plain))
    assert (drift.survival_min, drift.weighted_survival_min, drift.weighted_survival_min_tensor) == (0.2, 0.95, "b")
    assert judge(drift, Limits(survival_min=0.9), 1000, 0).outcome == "pass"
    lost = summarised(Drift(**PERFECT), (whole, KeptLayer("c", survival=0.5)))
    verdict = judge(lost, Limits(survival_min=0.9), 1000, 0)
    assert verdict.reasons == ("lowest survival is 0.5 in c, the limit is at least 0.9",)


def test_without_layers_there_is_no_summary() -> None:
    drift = Drift(**PERFECT)
    assert with_calibration(LAYERS, {}) == LAYERS
    assert summarised(drift, ()) is drift
