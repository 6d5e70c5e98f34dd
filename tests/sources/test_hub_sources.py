"""Base and adapter by Hub id, with the real client over a real socket; folders of its cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qlora_export.errors import ExitCode
from qlora_export.testing import HubServer
from tests.helpers.files import edit_json
from tests.processes import Finished, forked, fresh


@pytest.fixture
def served(base_copy: Path, adapter_copy: Path) -> dict[str, Path]:
    return {"acme/base": base_copy, "acme/adapter": adapter_copy}


@contextmanager
def hub(folders: dict[str, Path]) -> Iterator[HubServer]:
    """A Hub that serves these folders."""
    with HubServer() as server:
        for name, folder in folders.items():
            server.add_repository(name, folder)
        yield server


def downloaded(server: HubServer) -> list[str]:
    """Weight files that were fetched whole."""
    return [
        record.path.rsplit("/", 1)[-1]
        for record in server.requests
        if record.method == "GET" and record.path.endswith(".safetensors") and record.range is None
    ]


# The client reads its variables when it is imported, and the process that this one is forked from has imported it.
WITH_A_NEW_CLIENT = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
    del sys.modules[name]
from qlora_export.cli.main import run
run()
"""


def run(server: HubServer | None, cache: Path, *arguments: str, whole: bool = False) -> Finished:
    """The command in a process of its own, with a cache of its own."""
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment["HF_ENDPOINT"] = server.endpoint if server else "http://127.0.0.1:9"
    if whole:
        return fresh("-m", "qlora_export", *arguments, env=environment)
    return forked("-c", WITH_A_NEW_CLIENT, *arguments, env=environment, timeout=120)


def build(server: HubServer | None, tmp_path: Path, base: str, adapter: str, whole: bool = False) -> Finished:
    flags = ["--base", base, "--adapter", adapter, "--format", "bf16", "--out", str(tmp_path / "out")]
    return run(server, tmp_path / "cache", "build", *flags, whole=whole)


def test_base_and_adapter_come_from_the_hub_once(served: dict[str, Path], tmp_path: Path) -> None:
    with hub(served) as server:
        commit = server.repositories["acme/base"].head()
        first = build(server, tmp_path, f"acme/base@{commit}", "acme/adapter", whole=True)
        assert first.returncode == 0, first.stderr
        assert sorted(downloaded(server)) == ["adapter_model.safetensors", "model.safetensors"]
        again = build(server, tmp_path, f"acme/base@{commit}", "acme/adapter")
        assert "verified, kept" in again.stdout, again.stderr
        assert len(downloaded(server)) == 2
    manifest = json.loads((tmp_path / "out/bf16/manifest.json").read_text())
    assert manifest["sources"]["base"]["id"] == f"acme/base@{commit}"
    assert manifest["sources"]["adapter"]["id"].startswith("acme/adapter@")
    offline = build(None, tmp_path, f"acme/base@{commit}", "acme/adapter")
    assert "verified, kept" in offline.stdout, offline.stderr
    cached = tmp_path / "cache/hub/models--acme--base"
    kept = build(None, tmp_path, str(cached), str(tmp_path / "cache/hub/models--acme--adapter"))
    assert "verified, kept" in kept.stdout, kept.stderr


def test_what_cannot_be_merged_is_refused_before_any_weight(served: dict[str, Path], tmp_path: Path) -> None:
    edit_json(served["acme/adapter"] / "adapter_config.json", kasa_config={"beta": 1})
    with hub(served) as server:
        result = build(server, tmp_path, "acme/base", "acme/adapter")
        assert result.returncode == ExitCode.REFUSED
        assert "KaSA cannot be merged" in result.stderr
        assert downloaded(server) == []
    assert not (tmp_path / "out").exists()


def test_a_misfit_is_found_from_headers_alone(served: dict[str, Path], tmp_path: Path) -> None:
    edit_json(served["acme/adapter"] / "adapter_config.json", r=3)
    with hub(served) as server:
        result = build(server, tmp_path, "acme/base", "acme/adapter")
        assert result.returncode == ExitCode.BAD_INPUT
        assert "the base and r need [3, 64]" in result.stderr
        assert downloaded(server) == ["adapter_model.safetensors"]


def test_another_revision_than_in_training_is_refused(served: dict[str, Path], tmp_path: Path) -> None:
    edit_json(served["acme/adapter"] / "adapter_config.json", revision="0" * 40)
    with hub(served) as server:
        result = build(server, tmp_path, "acme/base", "acme/adapter")
    assert result.returncode == ExitCode.BAD_INPUT
    assert f"trained on revision {'0' * 40}" in result.stderr


@pytest.mark.parametrize(
    ("base", "code", "says"),
    [
        ("acme/nothing", ExitCode.BAD_INPUT, "acme/nothing: no such folder, and the Hub has no such model"),
        ("acme/base@v9", ExitCode.BAD_INPUT, "acme/base: the Hub has no such revision"),
    ],
)
def test_what_the_hub_does_not_have(
    served: dict[str, Path], tmp_path: Path, base: str, code: ExitCode, says: str
) -> None:
    with hub(served) as server:
        result = build(server, tmp_path, base, "acme/adapter")
    assert (result.returncode, says in result.stderr) == (code, True), result.stderr


def test_a_token_that_is_refused_is_no_reason_to_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 6)
    with HubServer(token="right", faults=["refusals-tell-token"]) as server:
        result = build(server, tmp_path, "acme/base", "acme/adapter")
    assert (result.returncode, "the Hub answers 401" in result.stderr) == (ExitCode.NOT_AUTHORISED, True), result.stderr
    assert "wrongwrong" not in result.stdout + result.stderr


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    result = build(None, tmp_path, "acme/base", "acme/adapter")
    assert result.returncode == ExitCode.ENVIRONMENT, result.stderr
    assert "acme/adapter: not in the local cache, and the Hub cannot be reached" in result.stderr
