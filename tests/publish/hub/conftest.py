"""A small release laid out, and the publisher's child process with the newest and the oldest client."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qlora_export.artifact import file_facts
from qlora_export.publish.hub.job import Target, Upload
from qlora_export.publish.hub.process import Client, run_job
from qlora_export.testing import HubServer

CARD = "---\nlicense: apache-2.0\nbase_model: acme/base\n---\n# A model\n"
CLIENTS = {"newest": None, "oldest": Path(sys.prefix) / "oldest-hub"}


@pytest.fixture(params=CLIENTS)
def library(request: pytest.FixtureRequest) -> Mapping[str, str]:
    """What makes the child import one of the two clients."""
    return library_of(request.param)


def library_of(name: str) -> Mapping[str, str]:
    """The environment of the newest or the oldest client."""
    folder = CLIENTS[name]
    if folder is None:
        return {}
    assert (folder / "huggingface_hub").is_dir(), "make installs the oldest client there"
    return {"PYTHONPATH": str(folder)}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """Two shards, a config and a card."""
    return make_release(tmp_path / "release")


def make_release(folder: Path) -> Path:
    """A small release in a new folder."""
    folder.mkdir()
    for number in (1, 2):
        values = np.full((300, 40), number, np.float32)
        save_file({f"w{number}": values}, folder / f"model-0000{number}-of-00002.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text(CARD)
    return folder


def client(server: HubServer, library: Mapping[str, str], **changes: Any) -> Client:
    environment = {
        "HF_ENDPOINT": server.endpoint,
        "HF_TOKEN": "hf_rehearsal",
        "HF_HUB_DISABLE_XET": "1",
        **library,
    }
    return Client(environment, **{"timeout_seconds": 20.0, **changes})


def upload(folder: Path, parent: str | None, target: Target | None = None, **changes: Any) -> dict[str, Any]:
    """The job's form of a commit of every file in the folder."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    value = Upload(
        target=target or Target("acme/model"),
        folder=str(folder),
        files={name: file_facts(folder / name) for name in names},
        prefixes=("",),
        parent=parent,
        revision="main",
        title="Release: model",
        description="Invocation 1",
        journal=str(folder.parent / "journal.ndjson"),
    )
    return {**vars(value), "target": vars(value.target), **changes}


def create(runner: Client, target: Target | None = None) -> str:
    """The repository's head once it exists."""
    answer = run_job(runner, "create", targets=[vars(target or Target("acme/model"))])
    assert answer["xet"] is False
    return str(answer["heads"][0])


def publish(runner: Client, folder: Path, parent: str | None, **changes: Any) -> dict[str, Any]:
    """The answer for one repository."""
    answer = run_job(runner, "publish", uploads=[upload(folder, parent, **changes)])
    found: dict[str, Any] = answer["committed"][0]
    return found
