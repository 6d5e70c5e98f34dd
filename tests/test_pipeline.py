"""The whole way, in the order that only the pipeline knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_export.errors import ExitCode, UsageError
from qlora_export.pipeline import RunOptions
from qlora_export.pipeline import release as run_release
from qlora_export.report.data import exit_code, report
from tests.conftest import RecipeMaker, folder_bytes

FAILS = {"format": "nf4", "limits": {"mean_kl": 0.0}}


@pytest.fixture
def release(pico_recipe: RecipeMaker, pico_text: Path, tmp_path: Path) -> Any:
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
