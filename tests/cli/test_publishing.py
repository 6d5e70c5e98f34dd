"""publish, verify and rehearse as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_export.errors import ExitCode
from qlora_export.testing import HubServer
from tests.cli.test_cli import started
from tests.processes import forked

TOKEN = "hf_" + "a1B2" * 8


def command(*arguments: Any, **variables: str) -> subprocess.CompletedProcess[str]:
    return forked("-m", "qlora_export", *arguments, env={**os.environ, **variables})


@pytest.fixture
def recipe(pico_base: Path, pico_adapter: Path, pico_text: Path, tmp_path: Path) -> Path:
    easy = {"perplexity_ratio": 1.5, "mean_kl": 1.0, "same_top1": 0.1, "gain_kept": None, "survival_min": None}
    data = {
        "base": str(pico_base),
        "base_id": "acme/base",
        "adapter": str(pico_adapter),
        "artifacts": ["bf16"],
        "drift": {"text": str(pico_text), "limits": easy},
        "publish": {"to": "hub:acme/bot", "version": "v1", "card": {"license": "apache-2.0"}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_check_publish_verify(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with HubServer(token=TOKEN, organisations=("acme",)) as hub:
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        assert command("check", recipe, "--out", out).returncode == 0
        words = ("--json", "--junit-xml", tmp_path / "junit.xml")
        found = started("publish", recipe, "--out", out, *words, env=os.environ | variables)
        assert found.returncode == 0, found.stderr
        (receipt,) = json.loads(found.stdout)["published"]
        assert receipt["commit"] == hub.repositories["acme/bot"].tags["v1"]
        assert receipt["proof"]["sample_tokens"] > 0
        again = command("publish", recipe, "--out", out, **variables)
        assert again.stdout.startswith("already published bf16 to "), again.stderr
        verified = started("verify", "acme/bot@v1", "--no-open", env=os.environ | variables)
        assert verified.returncode == 0, verified.stderr
        assert receipt["commit"] in verified.stdout
        wrong = command("publish", recipe, "--out", out, **{**variables, "HF_TOKEN": "hf_" + "x" * 30})
        assert wrong.returncode == ExitCode.NOT_AUTHORISED
    told = found.stdout + found.stderr + wrong.stderr + (tmp_path / "junit.xml").read_text()
    assert TOKEN not in told
    assert "x" * 30 not in told


def test_a_rehearsal_with_a_fault(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--fault", "commit-applied-then-closed")
    found = started("rehearse", recipe, "--out", out, *words, env=os.environ | {"HF_TOKEN": ""})
    assert found.returncode == 0, found.stderr
    assert "published bf16" in found.stdout
    assert "proven" in found.stdout
    refused = command("rehearse", recipe, "--out", out, "--fault", "commit-412")
    assert (refused.returncode, "main moved from" in refused.stderr) == (ExitCode.REMOTE_CONFLICT, True)
    assert "Traceback" not in refused.stderr


def test_the_faults_have_names() -> None:
    assert "commit-applied-then-closed" in command("rehearse", "--fault", "list").stdout


@pytest.mark.parametrize(
    ("fault", "text"),
    [("commit-504", "no such fault; is it commit-503?"), ("put-500:3", "takes no number"), ("put-slow:x", "no number")],
)
def test_what_is_no_fault(fault: str, text: str) -> None:
    found = command("rehearse", "--fault", fault)
    assert (found.returncode, text in found.stderr) == (ExitCode.USAGE, True), found.stderr


def test_the_proof_can_be_left_out(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = ("--set", "publish.to=folder:registry", "--set", "publish.card={}")
    for words, proven in ((["release", "--no-prove"], False), (["publish"], True)):
        found = command(*words, recipe, "--out", out, *settings, "--json")
        assert found.returncode == 0, found.stderr
        (receipt,) = json.loads(found.stdout)["published"]
        assert (receipt["proof"] is not None) == proven
    found = command("check", recipe, "--out", out, "--prove")
    assert (found.returncode, "No such option" in found.stderr) == (ExitCode.USAGE, True)


def test_a_folder_is_verified_by_its_manifest(recipe: Path, tmp_path: Path) -> None:
    assert command("build", recipe, "--out", tmp_path / "out").returncode == 0
    folder = tmp_path / "out" / "bf16"
    assert command("verify", folder).returncode == 0
    (folder / "extra.txt").write_text("x")
    found = command("verify", folder)
    assert (found.returncode, "extra.txt: is not part of the release" in found.stderr) == (10, True)
    (folder / "extra.txt").unlink()
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    found = command("verify", folder)
    assert (found.returncode, "model.safetensors: sha256" in found.stderr) == (10, True)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nowhere"], ExitCode.BAD_INPUT),
        (["."], ExitCode.BAD_INPUT),
        ([".", "--sample", "200%"], ExitCode.USAGE),
    ],
)
def test_what_cannot_be_verified(arguments: list[str], code: ExitCode, tmp_path: Path) -> None:
    found = forked("-m", "qlora_export", "verify", *arguments, cwd=tmp_path)
    assert (found.returncode, found.stderr.startswith("error: ")) == (code, True), found.stderr
