"""The whole way, in the order that only the pipeline knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from qlora_export.drift.reference_store import ReferenceStore
from qlora_export.errors import ExitCode, PlanRefused, RemoteConflict, UsageError
from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.release import check as run_check
from qlora_export.pipeline.release import release as run_release
from qlora_export.planning.make import make_plan
from qlora_export.recipe.load import make_recipe
from qlora_export.report.data import exit_code, report
from qlora_export.training import record
from tests.helpers.files import folder_bytes
from tests.helpers.pico import RecipeMaker, load_qlora, save_adapter

FAILS = {"format": "nf4", "limits": {"mean_kl": 0.0}}


@pytest.fixture
def shared_references(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the reference says of the text is kept once for all runs: under a digest of all that decides it."""
    place = tmp_path_factory.getbasetemp() / "references"
    monkeypatch.setattr(ReferenceStore, "folder", property(lambda store: place))


@pytest.fixture
def release(shared_references: None, pico_recipe: RecipeMaker, pico_text: Path, tmp_path: Path) -> Any:
    """Release some artifacts of the pico model to a registry."""

    def run(*artifacts: Any, **changes: Any) -> Any:
        drift = {"text": str(pico_text), "limits": {"gain_kept": None, "same_top1": None, "mean_kl": 1e-4}}
        publish = {"to": f"folder:{tmp_path / 'registry'}", "version": "v1"}
        recipe = pico_recipe(*artifacts, **{"drift": drift, "publish": publish, **changes})
        return run_release(recipe, RunOptions(tmp_path / "out"))

    return run


def published(tmp_path: Path) -> set[str]:
    registry = tmp_path / "registry"
    return {path.parent.name for path in registry.glob("*/latest")} if registry.exists() else set()


def test_what_passes_is_published(release: Any, tmp_path: Path) -> None:
    run = release("bf16", "nf4-adapter")
    assert exit_code(run) == ExitCode.OK
    assert published(tmp_path) == {"bf16", "nf4-adapter"}
    assert [item["artifact"] for item in report(run)["published"]] == ["bf16", "nf4-adapter"]
    assert folder_bytes(tmp_path / "registry/bf16/v1") == folder_bytes(tmp_path / "out/bf16")
    assert report(release("bf16", "nf4-adapter"))["published"] == report(run)["published"]


def test_one_failure_stops_everything(release: Any, tmp_path: Path) -> None:
    run = release("bf16", FAILS)
    assert exit_code(run) == ExitCode.GATE_FAILED
    assert published(tmp_path) == set()
    assert report(run)["published"] == []


def test_a_failure_may_be_withheld(release: Any, tmp_path: Path) -> None:
    run = release("bf16", {**FAILS, "on_failure": "withhold"})
    assert exit_code(run) == ExitCode.OK
    assert published(tmp_path) == {"bf16"}


def test_what_is_expected_to_fail_is_not_published_even_when_it_passes(release: Any, tmp_path: Path) -> None:
    run = release("bf16", {**FAILS, "expect": "fail"})
    assert exit_code(run) == ExitCode.OK
    assert published(tmp_path) == {"bf16"}
    run = release("nf4-adapter", {"format": "bf16", "expect": "fail"}, publish={"to": f"folder:{tmp_path / 'two'}"})
    assert exit_code(run) == ExitCode.GATE_FAILED
    assert not (tmp_path / "two").exists()


def test_when_everything_is_withheld_nothing_was_released(release: Any, tmp_path: Path) -> None:
    run = release({**FAILS, "on_failure": "withhold"})
    assert exit_code(run) == ExitCode.GATE_FAILED
    assert published(tmp_path) == set()


def test_a_failed_publication_is_in_the_report(release: Any, tmp_path: Path) -> None:
    release("bf16")
    (tmp_path / "registry/bf16/v1/config.json").unlink()
    with pytest.raises(RemoteConflict):
        release("bf16", "nf4-adapter")
    data = json.loads((tmp_path / "out/report.json").read_text())
    assert data["exit_code"] == 8
    assert data["published"] == []
    assert published(tmp_path) == {"bf16"}


def test_a_foreign_registry_is_found_before_the_work(release: Any, tmp_path: Path) -> None:
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry/thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="no registry of ours"):
        release("bf16")
    assert not (tmp_path / "out").exists()


def test_an_export_goes_the_same_way(release: Any, tmp_path: Path) -> None:
    run = release("onnx-fp32", "bf16")
    assert exit_code(run) == ExitCode.OK
    assert [artifact.name for artifact in run.artifacts] == ["onnx-fp32", "bf16"]
    assert published(tmp_path) == {"bf16", "onnx-fp32"}
    (entry, _) = run.ledger.entries
    assert entry.runtime == "onnxruntime"
    assert entry.drift.survival_min is None


def test_a_release_needs_a_place_and_a_text(release: Any, pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no publish.to"):
        release("bf16", publish=None)
    with pytest.raises(UsageError, match=r"no drift.text"):
        release("bf16", drift=None)
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_its_own(release: Any, pico_adapter: Path, tmp_path: Path) -> None:
    """Published as peft saved it, measured on the base of its training from the shipped folder."""
    run = release("adapter")
    assert exit_code(run) == ExitCode.OK
    (entry,) = run.ledger.entries
    assert entry.drift.mean_kl == 0
    place = tmp_path / "registry/adapter/v1"
    for name in ("adapter_config.json", "adapter_model.safetensors", "qlora_export.json"):
        assert (place / name).read_bytes() == (pico_adapter / name).read_bytes()
    assert all(artifact.reused for artifact in release("adapter").artifacts)


def test_a_merged_model_without_an_adapter(release: Any, pico_base: Path, tmp_path: Path) -> None:
    """Its own reference: bytes as they are, 4 bits judged by how far they are from it."""
    run = release("bf16", {"format": "nf4", "on_failure": "withhold"}, "onnx-fp32", adapter=None)
    assert exit_code(run) == ExitCode.OK
    assert published(tmp_path) == {"bf16", "onnx-fp32"}
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out/bf16", pico_base))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    entries = {entry.artifact.name: entry for entry in run.ledger.entries}
    assert entries["bf16"].drift.mean_kl == 0
    assert entries["nf4"].drift.mean_kl > 1e-4
    assert entries["nf4"].drift.gain_kept is None
    assert run.ledger.base is None
    assert report(run)["reference"]["model"] == "the model itself"


@pytest.mark.parametrize(
    ("artifact", "says"),
    [
        ("nf4-adapter", "ships an adapter, the recipe has none"),
        ("adapter", "the recipe has no adapter"),
        ({"format": "bf16", "onto": "as-trained"}, "no training without an adapter"),
    ],
)
def test_what_needs_an_adapter_says_so(release: Any, artifact: Any, says: str) -> None:
    with pytest.raises(UsageError if artifact == "adapter" else PlanRefused, match=says):
        release(artifact, adapter=None)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"], "use_rslora": True},
        {"trainable_token_indices": [2, 17, 300]},
    ],
)
def test_variants_are_measured_as_they_were_trained(
    pico_base: Path, pico_text: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """The live adapter of peft is the reference of every variant."""
    adapter = save_adapter(pico_base, tmp_path / "adapter", seed=5, **{"target_modules": ["q_proj"], **settings})
    data = {"base": str(pico_base), "adapter": str(adapter), "artifacts": ["bf16", "nf4-adapter", "adapter"]}
    drift = {"text": str(pico_text), "limits": {"gain_kept": None}}
    run = run_check(make_recipe({**data, "drift": drift}, Path(), "test"), RunOptions(tmp_path / "out"))
    assert run.ledger is not None
    divergences = {entry.artifact.name: entry.drift.mean_kl for entry in run.ledger.entries}
    assert divergences["bf16"] < 1e-4
    assert divergences["nf4-adapter"] < 1e-5
    assert divergences["adapter"] == 0
    survived = [entry.drift.survival_min for entry in run.ledger.entries if entry.drift.survival_min is not None]
    assert all(0.98 < value < 1.02 for value in survived)


@pytest.mark.filterwarnings("ignore")
def test_a_resized_vocabulary_is_measured(pico_base: Path, pico_text: Path, tmp_path: Path) -> None:
    """The reference is resized as training resized it; a base that keeps its own vocabulary is not shipped."""
    model = load_qlora(pico_base)
    model.resize_token_embeddings(2055, mean_resizing=False)
    live = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    live.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    record(live, tmp_path / "adapter", pico_base)
    data = {"base": str(pico_base), "adapter": str(tmp_path / "adapter"), "artifacts": ["bf16", "adapter"]}
    drift = {"text": str(pico_text), "limits": {"gain_kept": None}}
    run = run_check(make_recipe({**data, "drift": drift}, Path(), "test"), RunOptions(tmp_path / "out"))
    assert run.ledger is not None
    assert all(entry.drift.mean_kl < 1e-4 for entry in run.ledger.entries)
    with pytest.raises(PlanRefused, match="resized to 2055 rows in training, the base to ship has its own"):
        make_plan(make_recipe({**data, "artifacts": ["nf4-adapter"]}, Path(), "test"), tmp_path / "other")
