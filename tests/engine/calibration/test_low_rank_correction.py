"""nf4-lowrank from calibration to the folder: what is served, what peft loads, what is left without a correction."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlora_export.artifact import Artifact
from qlora_export.drift.survival import survival
from qlora_export.engine import BuildOptions, build
from qlora_export.engine.calibration.block_pass import CalibrationOptions
from qlora_export.engine.calibration.calibrate import calibrate
from qlora_export.errors import PlanRefused, UsageError
from qlora_export.formats.served_weight import served_rows
from qlora_export.merge.merged_rows import MergedRows
from qlora_export.planning.make import make_plan
from qlora_export.planning.plan import Plan
from qlora_export.quant.rounding.solving import Method
from qlora_export.recipe.load import make_recipe
from qlora_export.runtimes.transformers import TransformersRuntime
from qlora_export.tensors.header import read_header
from qlora_export.tensors.reading import SourceFiles
from tests.engine.calibration.models import plan_of, save_family, windows_of
from tests.helpers.files import folder_bytes
from tests.helpers.pico import RecipeMaker, save_adapter, save_base

LOWRANK = {"format": "nf4-lowrank", "options": {"rank": 4}}
CALIBRATION = {"calibration": {"text": "calibration.txt"}}
TOKENS = windows_of(16)
HASTY = Method(sweeps=0, fits_scales=False, rounds=1)
pytestmark = pytest.mark.usefixtures("hasty_search")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A base whose last matrix has columns in no whole blocks, and two artifacts that differ in the correction."""
    folder = tmp_path_factory.mktemp("correcting")
    base = save_base(folder / "base", seed=5)
    data = {
        "base": str(base),
        "adapter": str(save_adapter(base, folder / "adapter", seed=6, size=0.01)),
        "artifacts": [LOWRANK, {"format": "nf4", "rounding": "calibrated"}],
        "shard_bytes": 300_000,
        **CALIBRATION,
    }
    return make_plan(make_recipe(data, Path(), "test"), folder / "out")


def built(plan: Plan, out: Path, blocks: Path | None = None) -> list[Artifact]:
    """The artifacts of a plan, each calibrated in a hurry; `blocks` are taken from an earlier run."""
    out.mkdir()
    for folder in blocks.glob("*.calibrated") if blocks else ():
        shutil.copytree(folder, out / folder.name)
    made = [calibrate(plan, item, TOKENS, CalibrationOptions(out, method=HASTY)) for item in plan.artifacts]
    items = tuple(replace(item, made=found) for item, found in zip(plan.artifacts, made, strict=True))
    return build(replace(plan, artifacts=items), out, BuildOptions())


@pytest.fixture(scope="module")
def artifacts(hasty_search: None, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> list[Artifact]:
    return built(plan, tmp_path_factory.mktemp("correcting") / "out")


def served(plan: Plan, artifact: Artifact, number: int = 0) -> dict[str, torch.Tensor]:
    """The weights that the folder's linear layers multiply with, by our own decoding."""
    item, found = plan.artifacts[number], {}
    parts = {}
    with SourceFiles() as files:
        for shard in item.layout.shards:
            for name, stored in read_header(artifact.path / shard.file).items():
                parts[name] = files.read_bytes(stored, 0, stored.bytes)
    for name, route in item.routes.items():
        if route.form is not None and route.form.quantises:
            values = served_rows(route.form, route.spec, parts, range(route.spec.rows), "BF16")
            found[name] = torch.from_numpy(values.reshape(route.spec.shape).copy())
    return found


def test_the_plan_is_the_folder(plan: Plan, artifacts: list[Artifact]) -> None:
    item, folder = plan.artifacts[0], artifacts[0].path
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert sorted(sizes) == sorted([*item.files, "manifest.json"])
    assert {shard.file: shard.bytes for shard in item.layout.shards}.items() <= sizes.items()
    assert item.bytes == sum(sizes.values()) - sizes["manifest.json"]
    assert len([name for name in sizes if name.startswith("model-")]) > 1
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert not [name for name in index["weight_map"] if "lora" in name]
    assert (item.rounding.stated, item.rounding.chosen) == (None, "calibrated")
    assert artifacts[0].manifest["rounding"]["chosen"] == "calibrated"
    assert len(artifacts[0].manifest["calibration"]["layers"]) == 14


def test_only_what_was_rounded_by_calibration_is_corrected(plan: Plan, artifacts: list[Artifact]) -> None:
    factors = load_file(artifacts[0].path / "adapter/adapter_model.safetensors")
    layers = artifacts[0].manifest["calibration"]["layers"]
    assert len(factors) == 28
    for name, tensor in factors.items():
        stored = name.removeprefix("base_model.model.").partition(".lora_")[0] + ".weight"
        assert tensor.any() == ("fallback" not in layers[stored])
        assert tensor.dtype == torch.bfloat16
        assert 4 in tensor.shape
    assert sum("fallback" in facts for facts in layers.values()) == 2


def test_peft_loads_it_without_a_word_and_computes_what_was_decided(plan: Plan, artifacts: list[Artifact]) -> None:
    folder = artifacts[0].path
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)  # transformers 5.23 of what peft 0.21 asks for
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
        peft.PeftModel.from_pretrained(model, folder / "adapter")
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == ".."
    assert len(config["target_modules"]) == 14
    _require_same_model(plan, artifacts[0])


def test_layers_that_are_stored_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2: its Conv1D weights are [in, out], the factors those of [out, in]."""
    base, adapter = save_family("gpt2", tmp_path)
    plan = plan_of(base, adapter, tmp_path / "out", {"format": "nf4-lowrank", "options": {"rank": 3}})
    (artifact,) = built(plan, tmp_path / "out")
    factors = load_file(artifact.path / "adapter/adapter_model.safetensors")
    assert factors["base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight"].shape == (3, 64)
    assert factors["base_model.model.transformer.h.0.mlp.c_fc.lora_B.weight"].shape == (128, 3)
    assert all(factor.any() for factor in factors.values())
    _require_same_model(plan, artifact)


def _require_same_model(plan: Plan, artifact: Artifact) -> None:
    """The opened folder computes what a dense model of the weights does that calibration went on with."""
    tokens = [5, 17, 40, 8, 90, 33]
    with TransformersRuntime().open(artifact.path) as session:
        found = session.log_probabilities(tokens)
    dense = transformers.AutoModelForCausalLM.from_pretrained(plan.checkpoint.folder, dtype=torch.float32)
    for name, values in served(plan, artifact).items():
        dense.get_parameter(name).data = values.T if plan.model.outputs[name].transposed else values
    with torch.no_grad():
        wanted = torch.log_softmax(dense.eval()(input_ids=torch.tensor([tokens])).logits[0], dim=-1).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_calibration_goes_on_with_the_corrected_layers(plan: Plan, artifacts: list[Artifact]) -> None:
    """The first layers have the same inputs in both artifacts, so the same codes; later ones see others."""
    corrected, plain = (artifact.manifest["calibration"]["layers"] for artifact in artifacts)
    first = "model.layers.0.self_attn.q_proj.weight"
    codes = [_tensors(artifact.path) for artifact in artifacts]
    assert torch.equal(codes[0][first], codes[1][first])
    assert corrected[first]["output_error"] < 0.9 * plain[first]["output_error"]
    last = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(codes[0][last], codes[1][last])
    for name, facts in corrected.items():
        if "fallback" not in facts:
            assert facts["output_error"] < plain[name]["output_error"]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_survival_counts_the_correction(plan: Plan, artifacts: list[Artifact]) -> None:
    item = plan.artifacts[0]
    found = survival(plan, item, artifacts[0])
    weights = served(plan, artifacts[0])
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        with SourceFiles() as files:
            rows = MergedRows(plan.model.outputs[name], plan.training, files, False, "as-trained")
            base, merged = (torch.from_numpy(values).double().reshape(weights[name].shape) for values in rows.whole())
        delta = merged - base
        expected = ((weights[name].double() - base) * delta).sum() / (delta * delta).sum()
        assert found[name] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("lost", ["nothing", "the second block"])
def test_a_run_goes_on_from_its_blocks_to_the_same_bytes(
    plan: Plan, artifacts: list[Artifact], tmp_path: Path, lost: str
) -> None:
    earlier = Path(shutil.copytree(artifacts[0].path.parent, tmp_path / "earlier"))
    if lost == "the second block":
        for path in earlier.glob("*.calibrated/block-0001.safetensors"):
            path.unlink()
    again = built(plan, tmp_path / "out", earlier)
    assert folder_bytes(again[0].path) == folder_bytes(artifacts[0].path)


@pytest.mark.parametrize(
    ("artifact", "changes", "message"),
    [
        ({**LOWRANK, "rounding": "nearest"}, CALIBRATION, "nf4-lowrank is not rounded nearest"),
        ({**LOWRANK, "rounding": "tuned"}, CALIBRATION, "nf4-lowrank is not rounded tuned"),
        (LOWRANK, {}, "the correction of nf4-lowrank needs a text to calibrate on"),
        ({**LOWRANK, "rounding": "calibrated"}, {}, "needs a text to calibrate on"),
        ({"format": "nf4-lowrank", "options": {"rank": 0}}, CALIBRATION, "rank is 0"),
    ],
)
def test_what_cannot_be(
    pico_recipe: RecipeMaker, tmp_path: Path, artifact: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanRefused, match=message) as caught:
        make_plan(pico_recipe(artifact, **changes), tmp_path)
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_a_budget_without_room_is_told_with_the_artifact(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="artifact nf4-lowrank: .*correction_bits 0.1 hold no component"):
        make_plan(pico_recipe("nf4-lowrank", **CALIBRATION), tmp_path)
    plan = make_plan(pico_recipe({**LOWRANK, "rounding": "calibrated", "name": "stated"}, **CALIBRATION), tmp_path)
    assert plan.artifacts[0].rounding.stated == "calibrated"
