"""The real client on classic large file transfer, and a small folder to publish."""

from __future__ import annotations

import hashlib
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.utils
import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from qlora_export.testing import HubServer

Connect = Callable[..., huggingface_hub.HfApi]
REPOSITORY = "acme/model"
CLIENT_WARNING = "ignore:Use 'content=<...>' to upload raw bytes/text content:DeprecationWarning"
CARD = "---\nlicense: apache-2.0\nbase_model: acme/base\nbase_model_relation: finetune\n---\n# A model\n"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the client would have slept between its attempts."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Clients of a hub, their connections closed at the end."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)

    def client(hub: HubServer, token: str | bool = "a-token") -> huggingface_hub.HfApi:
        return huggingface_hub.HfApi(endpoint=hub.endpoint, token=token)

    yield client
    huggingface_hub.utils.close_session()


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """Small and large files, one in a subfolder."""
    folder = tmp_path / "release"
    (folder / "onnx").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model-00001-of-00002.safetensors").write_bytes(bytes(range(256)) * 1000)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"\1\2\3" * 33_333)
    (folder / "onnx/model.onnx").write_bytes(b"onnx" * 5000)
    return folder


def additions(folder: Path) -> list[CommitOperationAdd]:
    """Every file of a folder, to be committed."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in paths]


def publish(api: HfApi, folder: Path, **options: Any) -> Any:
    """One commit of a folder to a private repository."""
    api.create_repo(REPOSITORY, private=True, exist_ok=True)
    return api.create_commit(REPOSITORY, additions(folder), commit_message="release", **options)


def fetch(address: str, method: str = "GET", data: bytes | None = None, **headers: str) -> tuple[int, bytes, Any]:
    """One request without the client."""
    request = urllib.request.Request(address, method=method, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, reply.read(), reply.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


def sha256(path: Path) -> str:
    """Hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
