"""A plan that was kept is what happens later, or nothing does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qlora_export.errors import ExitCode
from tests.cli.inside import inside
from tests.helpers.files import edit_tensors
from tests.processes import Finished, forked


@pytest.fixture
def place(base_copy: Path, adapter_copy: Path, pico_text: Path, tmp_path: Path) -> Path:
    """A folder with base, adapter, text, recipe and the plan that was kept of it."""
    shutil.copy(pico_text, tmp_path / "text.jsonl")
    easy = {"perplexity_ratio": 1.5, "mean_kl": 1.0, "same_top1": 0.1, "gain_kept": None, "survival_min": None}
    recipe = {
        "base": "base",
        "adapter": "adapter",
        "artifacts": ["bf16"],
        "drift": {"text": "text.jsonl", "limits": easy},
        "publish": {"to": "folder:registry", "version": "v1"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = inside("plan", tmp_path / "recipe.yaml", "-o", tmp_path / "plan.json")
    assert result.returncode == 0, result.stderr
    return tmp_path


def release(place: Path, *arguments: Any) -> Finished:
    return inside("release", place / "plan.json", "--out", place / "out", *arguments)


def test_it_is_released_as_planned(place: Path) -> None:
    planned = json.loads((place / "plan.json").read_text())
    (place / "recipe.yaml").unlink()
    result = forked("-m", "qlora_export", "release", place / "plan.json", "--out", place / "out")
    assert result.returncode == 0, result.stderr
    manifest = json.loads((place / "registry/bf16/v1/manifest.json").read_text())
    assert manifest["plan_digest"] == planned["pinned"]["artifact"]["bf16"]
    assert manifest["sources"]["base"]["files"] == planned["pinned"]["base_files"]


def change_value(tensors: dict[str, torch.Tensor]) -> None:
    first = next(iter(tensors.values()))
    first.view(-1)[0] += 1


CHANGES = {
    "a weight of the base": lambda place: edit_tensors(place / "base/model.safetensors", change_value),
    "a factor of the adapter": lambda place: edit_tensors(place / "adapter/adapter_model.safetensors", change_value),
    "the text": lambda place: (place / "text.jsonl").write_text((place / "text.jsonl").read_text() + "\n\n"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_input_is_refused(place: Path, change: str) -> None:
    CHANGES[change](place)
    result = release(place)
    # The sidecar notices a changed base while it is built, before the plan is compared.
    assert result.returncode in (ExitCode.REFUSED, ExitCode.BAD_INPUT), result.stderr
    assert result.returncode == ExitCode.REFUSED or "base" in change
    assert "Traceback" not in result.stderr
    assert not (place / "registry").exists()


def test_a_plan_of_another_version(place: Path) -> None:
    data = json.loads((place / "plan.json").read_text())
    (place / "plan.json").write_text(json.dumps({**data, "version": "0.0.1"}))
    result = release(place)
    assert (result.returncode, "planned by version 0.0.1" in result.stderr) == (ExitCode.REFUSED, True)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"pinned": {}, "folder": 3}'])
def test_what_is_no_plan(place: Path, content: str) -> None:
    (place / "plan.json").write_text(content)
    result = release(place)
    assert (result.returncode, "no plan that was kept" in result.stderr) == (ExitCode.USAGE, True), result.stderr


def test_a_plan_takes_no_flags(place: Path) -> None:
    result = release(place, "--set", "artifacts.0.format=fp16")
    assert (result.returncode, "is released as it is" in result.stderr) == (ExitCode.USAGE, True)


def test_what_measuring_decides_cannot_be_kept(place: Path) -> None:
    result = inside("plan", place / "recipe.yaml", "--set", "merge.onto=auto", "-o", place / "other.json")
    assert (result.returncode, "cannot promise" in result.stderr) == (ExitCode.USAGE, True)
