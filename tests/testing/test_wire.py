"""Listings, ranges and uploads at the level of single requests."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import (
    EntryNotFoundError,
)

from qlora_export.testing import HubServer, Limits
from tests.testing.conftest import CLIENT_WARNING, REPOSITORY, Connect, fetch, sha256

pytestmark = pytest.mark.filterwarnings(CLIENT_WARNING)


def test_downloads_by_range(release: Path) -> None:
    with HubServer() as hub:
        oid = hub.add_repository(REPOSITORY, release)
        address = f"{hub.endpoint}/{REPOSITORY}/resolve/main/model-00001-of-00002.safetensors"
        whole = bytes(range(256)) * 1000
        for span, start, end in [("2-5", 2, 6), ("255990-", 255_990, 256_000), ("-7", 255_993, 256_000)]:
            status, content, headers = fetch(address, Range=f"bytes={span}")
            assert (status, content) == (206, whole[start:end])
            assert headers["Content-Range"] == f"bytes {start}-{end - 1}/256000"
        assert fetch(address, Range="bytes=5-999999999")[1] == whole[5:]
        assert fetch(address, Range="bytes=256000-")[0] == 416
        status, content, headers = fetch(address, "HEAD")
        assert (status, content, headers["Content-Length"]) == (200, b"", "256000")
        assert (headers["X-Repo-Commit"], headers["X-Linked-Size"]) == (oid, "256000")
        assert hub.requests[0].range == "bytes=2-5"


def test_a_long_history_and_tree_come_in_pages(connect: Connect) -> None:
    with HubServer(limits=Limits(page_rows=4)) as hub:
        api = connect(hub)
        api.create_repo(REPOSITORY)
        for number in range(9):
            change = [CommitOperationAdd(f"folder {number}/a+b&c.txt", b"x%d" % number)]
            api.create_commit(REPOSITORY, change, commit_message=f"commit {number}")
        assert len(api.list_repo_commits(REPOSITORY)) == 10
        rows = [row.path for row in api.list_repo_tree(REPOSITORY, recursive=True)]
        assert len(rows) == len(set(rows)) == 19
        assert [row.path for row in api.list_repo_tree(REPOSITORY, "folder 3")] == ["folder 3/a+b&c.txt"]
        with pytest.raises(EntryNotFoundError):
            list(api.list_repo_tree(REPOSITORY, "nothing"))
        asked = api.get_paths_info(REPOSITORY, ["folder 4/a+b&c.txt", "folder 5", "nothing"])
        assert [row.path for row in asked] == ["folder 4/a+b&c.txt", "folder 5"]


def test_model_info_names_files_sizes_and_hashes(connect: Connect, release: Path) -> None:
    with HubServer() as hub:
        oid = hub.add_repository(REPOSITORY, release)
        api = connect(hub)
        info = api.model_info(REPOSITORY, files_metadata=True)
        files = {item.rfilename: item for item in info.siblings}
        shard = "model-00002-of-00002.safetensors"
        assert info.sha == oid
        assert (files[shard].size, files[shard].lfs.sha256) == (99_999, sha256(release / shard))
        assert files["config.json"].lfs is None
        assert info.card_data["base_model"] == "acme/base"
        assert api.model_info(REPOSITORY, revision=oid[:8]).sha == oid
        assert hub.repositories[REPOSITORY].read("main", "onnx/model.onnx") == b"onnx" * 5000


def test_content_that_is_not_what_was_announced_is_refused(tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:
        create = json.dumps({"name": "model", "organization": "acme"}).encode()
        fetch(f"{hub.endpoint}/api/repos/create", "POST", create)
        oid = hashlib.sha256(b"announced").hexdigest()
        batch = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": 9}]}
        address = f"{hub.endpoint}/{REPOSITORY}.git/info/lfs/objects/batch"
        actions = json.loads(fetch(address, "POST", json.dumps(batch).encode())[1])["objects"][0]["actions"]
        assert fetch(actions["upload"]["href"], "PUT", b"something")[0] == 200
        assert not list((tmp_path / "hub/large").iterdir())
        asked = json.dumps({"oid": oid, "size": 9}).encode()
        status, content, _ = fetch(actions["verify"]["href"], "POST", asked)
        assert (status, f"{oid} of 9 bytes was announced" in content.decode()) == (422, True)
        lines = [
            {"key": "header", "value": {"summary": "a"}},
            {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": oid, "size": 9}},
        ]
        body = "\n".join(map(json.dumps, lines)).encode()
        commit = f"{hub.endpoint}/api/models/{REPOSITORY}/commit/main"
        assert fetch(commit, "POST", body)[0] == 400
        assert len(hub.repositories[REPOSITORY].commits()) == 1
        assert fetch(actions["upload"]["href"], "PUT", b"announced")[0] == 200
        assert fetch(actions["verify"]["href"], "POST", asked)[0] == 200
        assert fetch(commit, "POST", body)[0] == 200


@pytest.mark.parametrize("path", ["../outside", "/absolute", ".git/config", "a/../../b", "a\\b", ""])
def test_a_hostile_path_is_refused(path: str) -> None:
    with HubServer() as hub:
        fetch(f"{hub.endpoint}/api/repos/create", "POST", b'{"name": "model", "organization": "acme"}')
        lines = [{"key": "header", "value": {"summary": "a"}}, {"key": "file", "value": {"path": path, "content": ""}}]
        body = "\n".join(map(json.dumps, lines)).encode()
        assert fetch(f"{hub.endpoint}/api/models/{REPOSITORY}/commit/main", "POST", body)[0] == 400
        assert list(hub.repositories[REPOSITORY].files()) == [".gitattributes"]


def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:
        fetch(f"{hub.endpoint}/api/repos/create", "POST", b'{"name": "model", "organization": "acme"}')
        oid = hashlib.sha256(b"x" * 1000).hexdigest()
        batch = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": 1000}]}
        address = f"{hub.endpoint}/{REPOSITORY}.git/info/lfs/objects/batch"
        actions = json.loads(fetch(address, "POST", json.dumps(batch).encode())[1])["objects"][0]["actions"]
        target = actions["upload"]["href"].removeprefix(hub.endpoint)
        with socket.create_connection(("127.0.0.1", int(hub.endpoint.rsplit(":", 1)[1]))) as connection:
            connection.sendall(f"PUT {target} HTTP/1.1\r\nContent-Length: 1000\r\n\r\n".encode() + b"x" * 400)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100) == b""
        assert not list((tmp_path / "hub/incoming").iterdir())
        again = json.loads(fetch(address, "POST", json.dumps(batch).encode())[1])["objects"][0]
        assert "actions" in again


@pytest.mark.parametrize(("xet", "status"), [(True, 200), (False, 404)])
def test_a_probe_for_xet(release: Path, xet: bool, status: int) -> None:
    with HubServer(xet=xet) as hub:
        hub.add_repository(REPOSITORY, release)
        found, _, headers = fetch(f"{hub.endpoint}/api/models/{REPOSITORY}/xet-write-token/main")
        assert (found, "X-Xet-Cas-Url" in headers) == (status, xet)
