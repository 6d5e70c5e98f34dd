"""The server as a process and as a context: it starts, keeps contents on disk, and closes everything."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd

from qlora_export.testing import HubServer
from tests.testing.conftest import CLIENT_WARNING, REPOSITORY, Connect, fetch

pytestmark = pytest.mark.filterwarnings(CLIENT_WARNING)


def test_everything_is_closed_when_the_block_ends(release: Path) -> None:
    before = threading.active_count()
    with HubServer() as hub:
        address = ("127.0.0.1", int(hub.endpoint.rsplit(":", 1)[1]))
        with socket.create_connection(address) as idle:
            fetch(f"{hub.endpoint}/api/whoami-v2")
            assert threading.active_count() > before
            hub.__exit__(None, None, None)
            assert idle.recv(1) == b""
    assert threading.active_count() == before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def test_contents_lie_on_disk_and_served_folders_are_not_copied(
    connect: Connect, release: Path, tmp_path: Path
) -> None:
    with HubServer(tmp_path / "hub") as hub:
        hub.add_repository("acme/served", release)
        assert not list((tmp_path / "hub/large").iterdir())
        (release / "new.safetensors").write_bytes(b"new")
        connect(hub).create_repo(REPOSITORY)
        change = [CommitOperationAdd("new.safetensors", str(release / "new.safetensors"))]
        connect(hub).create_commit(REPOSITORY, change, commit_message="new")
    assert (tmp_path / "hub/large" / hashlib.sha256(b"new").hexdigest()).read_bytes() == b"new"


CLIENT = """
import sys
from huggingface_hub import HfApi, snapshot_download
api = HfApi()
api.create_repo("acme/model", private=True)
api.upload_folder(repo_id="acme/model", folder_path=sys.argv[1], commit_message="release")
snapshot_download("acme/model")
"""


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The module as a process, and its address."""
    command = [sys.executable, "-m", "qlora_export.testing", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip(), server
        finally:
            server.kill()


def test_the_module_serves_until_interrupted(release: Path, tmp_path: Path) -> None:
    with serving("--port", "0", "--repository", "acme/base", str(release)) as (endpoint, server):
        settings = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "cache")}
        environment = {**os.environ, **settings, "HF_TOKEN": "any"}
        client = [sys.executable, "-c", CLIENT, str(release)]
        result = subprocess.run(client, env=environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        rows = json.loads(fetch(f"{endpoint}/api/models/acme/model/tree/main?recursive=true")[1])
        assert len(rows) == 7
        assert json.loads(fetch(f"{endpoint}/api/models/acme/base")[1])["private"] is False
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=10) == 0


def test_the_server_needs_no_torch() -> None:
    code = "import sys, qlora_export.testing as t; sys.exit('torch' in sys.modules or 'huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
