"""The Hub as the real client sees it: what is sent arrives, what is read is what was sent."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qlora_export.testing import HubServer, Limits
from tests.testing.conftest import CARD, CLIENT_WARNING, Connect

pytestmark = pytest.mark.filterwarnings(CLIENT_WARNING)
REPOSITORY = "acme/model"


def additions(folder: Path) -> list[CommitOperationAdd]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in paths]


def publish(api: HfApi, folder: Path, **options: Any) -> Any:
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
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("part_bytes", [10**9, 100_000, 99_999])
def test_a_release_arrives_and_comes_back(connect: Connect, release: Path, tmp_path: Path, part_bytes: int) -> None:
    with HubServer(limits=Limits(part_bytes=part_bytes, page_rows=3)) as hub:
        api = connect(hub)
        commit = publish(api, release)
        repository = hub.repositories[REPOSITORY]
        assert (repository.head(), repository.private) == (commit.oid, True)
        assert [item.title for item in repository.commits()] == ["release", "initial commit"]
        assert api.verify_repo_checksums(REPOSITORY, local_dir=release).missing_paths == [".gitattributes"]
        rows = {row.path: row for row in api.list_repo_tree(REPOSITORY, recursive=True)}
        shard = release / "model-00001-of-00002.safetensors"
        assert rows[shard.name].lfs.sha256 == sha256(shard)
        assert rows["config.json"].lfs is None
        assert len(rows) == 7
        folder = snapshot_download(REPOSITORY, endpoint=hub.endpoint, token="any", cache_dir=tmp_path / "cache")
        for path in release.rglob("*"):
            if path.is_file():
                assert (Path(folder) / path.relative_to(release)).read_bytes() == path.read_bytes()
        parts = [record.path for record in hub.requests if "/part/" in record.path]
        assert len(parts) == {10**9: 0, 100_000: 3, 99_999: 3}[part_bytes]


def test_what_is_there_is_not_sent_again(connect: Connect, release: Path) -> None:
    with HubServer() as hub:
        api = connect(hub)
        first = publish(api, release)
        again = publish(api, release)
        assert again.oid == first.oid
        assert len(hub.repositories[REPOSITORY].commits()) == 2
        assert sum(record.method == "PUT" for record in hub.requests) == 3


def test_shards_go_up_one_by_one_before_the_commit(connect: Connect, release: Path) -> None:
    with HubServer() as hub:
        api = connect(hub)
        api.create_repo(REPOSITORY)
        planned = additions(release)
        for addition in planned:
            api.preupload_lfs_files(REPOSITORY, [addition])
        assert list(hub.repositories[REPOSITORY].files()) == [".gitattributes"]
        stored = sum(record.method == "PUT" for record in hub.requests)
        api.create_commit(REPOSITORY, planned, commit_message="release")
        assert sum(record.method == "PUT" for record in hub.requests) == stored == 3
        assert len(hub.repositories[REPOSITORY].files()) == 6


def test_a_commit_on_a_head_that_has_moved_is_refused(connect: Connect, release: Path) -> None:
    with HubServer() as hub:
        api = connect(hub)
        api.create_repo(REPOSITORY)
        parent = api.repo_info(REPOSITORY).sha
        api.create_commit(REPOSITORY, [CommitOperationAdd("note.txt", b"first")], commit_message="other")
        with pytest.raises(HfHubHTTPError) as refused:
            publish(api, release, parent_commit=parent)
        assert refused.value.response.status_code == 412
        assert sorted(hub.repositories[REPOSITORY].files()) == [".gitattributes", "note.txt"]


def test_files_and_folders_are_removed(connect: Connect, release: Path) -> None:
    with HubServer() as hub:
        api = connect(hub)
        publish(api, release)
        gone = [CommitOperationDelete("config.json"), CommitOperationDelete("onnx/")]
        api.create_commit(REPOSITORY, gone, commit_message="fewer")
        assert "config.json" not in hub.repositories[REPOSITORY].files()
        assert "onnx/model.onnx" not in hub.repositories[REPOSITORY].files()
        with pytest.raises(EntryNotFoundError):
            api.create_commit(REPOSITORY, gone[:1], commit_message="again")
        assert len(hub.repositories[REPOSITORY].commits()) == 3


def test_a_pull_request_is_proposed_extended_and_merged(connect: Connect, release: Path) -> None:
    with HubServer() as hub:
        api = connect(hub)
        proposed = publish(api, release, create_pr=True)
        repository = hub.repositories[REPOSITORY]
        assert (proposed.pr_num, proposed.pr_revision) == (1, "refs/pr/1")
        assert list(repository.files()) == [".gitattributes"]
        more = [CommitOperationAdd("note.txt", b"more")]
        api.create_commit(REPOSITORY, more, commit_message="more", revision="refs/pr/1")
        assert repository.read("refs/pr/1", "note.txt") == b"more"
        assert repository.pull_requests[1].status == "open"
        assert api.get_discussion_details(REPOSITORY, 1).is_pull_request
        assert [item.num for item in api.get_repo_discussions(REPOSITORY)] == [1]
        assert {row.path for row in api.list_repo_tree(REPOSITORY, revision="refs/pr/1")} >= {"note.txt", "onnx"}
        refs = api.list_repo_refs(REPOSITORY, include_pull_requests=True)
        assert refs.pull_requests[0].target_commit == repository.head("refs/pr/1")
        api.merge_pull_request(REPOSITORY, 1, comment="good")
        assert repository.pull_requests[1].status == "merged"
        assert len(repository.files()) == 7


def test_an_empty_pull_request_is_a_draft(connect: Connect) -> None:
    with HubServer() as hub:
        api = connect(hub)
        api.create_repo(REPOSITORY)
        opened = api.create_pull_request(REPOSITORY, title="soon")
        assert (opened.num, opened.status) == (1, "draft")
        change = [CommitOperationAdd("note.txt", b"now")]
        api.create_commit(REPOSITORY, change, commit_message="now", revision=opened.git_reference)
        assert api.get_discussion_details(REPOSITORY, 1).status == "open"
        api.change_discussion_status(REPOSITORY, 1, "closed")
        with pytest.raises(HfHubHTTPError, match="is closed"):
            api.merge_pull_request(REPOSITORY, 1)


def test_tags_and_branches(connect: Connect, release: Path) -> None:
    with HubServer() as hub:
        api = connect(hub)
        commit = publish(api, release)
        api.create_tag(REPOSITORY, tag="v1", revision=commit.oid)
        with pytest.raises(HfHubHTTPError) as taken:
            api.create_tag(REPOSITORY, tag="v1", revision=commit.oid)
        assert taken.value.response.status_code == 409
        api.create_branch(REPOSITORY, branch="next", revision=commit.oid)
        api.create_commit(REPOSITORY, [CommitOperationAdd("a", b"a")], commit_message="a", revision="next")
        refs = api.list_repo_refs(REPOSITORY)
        assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", commit.oid)]
        assert {branch.name for branch in refs.branches} == {"main", "next"}
        assert hub.repositories[REPOSITORY].tags == {"v1": commit.oid}
        assert [item.title for item in api.list_repo_commits(REPOSITORY, revision="next")][:2] == ["a", "release"]
        api.delete_branch(REPOSITORY, branch="next")
        api.delete_tag(REPOSITORY, tag="v1")
        with pytest.raises(RevisionNotFoundError):
            api.list_repo_commits(REPOSITORY, revision="v1")
        with pytest.raises(HfHubHTTPError, match="v1 is no branch"):
            hub.repositories[REPOSITORY].put_tag("v1", "main")
            api.create_commit(REPOSITORY, [CommitOperationAdd("a", b"a")], commit_message="a", revision="v1")


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


def test_visibility_is_set_at_creation_and_later(connect: Connect) -> None:
    with HubServer() as hub:
        api = connect(hub)
        api.create_repo(REPOSITORY, private=True)
        api.create_repo(REPOSITORY, private=False, exist_ok=True)
        assert api.repo_info(REPOSITORY).private
        with pytest.raises(HfHubHTTPError) as exists:
            api.create_repo(REPOSITORY)
        assert exists.value.response.status_code == 409
        api.update_repo_settings(REPOSITORY, private=False, gated="manual")
        info = api.repo_info(REPOSITORY)
        assert (info.private, info.gated) == (False, "manual")
        body = json.dumps({"name": "old", "organization": "acme", "private": True}).encode()
        fetch(f"{hub.endpoint}/api/repos/create", "POST", body)
        assert hub.repositories["acme/old"].private
        api.delete_repo(REPOSITORY)
        assert list(hub.repositories) == ["acme/old"]


def test_other_kinds_of_repositories_have_their_prefix(connect: Connect, tmp_path: Path) -> None:
    with HubServer() as hub:
        api = connect(hub)
        api.create_repo(REPOSITORY, repo_type="dataset")
        change = [CommitOperationAdd("rows.parquet", b"PAR1" * 9)]
        api.create_commit(REPOSITORY, change, commit_message="rows", repo_type="dataset")
        path = hf_hub_download(
            REPOSITORY, "rows.parquet", repo_type="dataset", endpoint=hub.endpoint, cache_dir=tmp_path, token=False
        )
        assert Path(path).read_bytes() == b"PAR1" * 9
        assert list(hub.repositories) == [f"datasets/{REPOSITORY}"]


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


def test_errors_carry_the_code_that_the_client_reads(connect: Connect, release: Path) -> None:
    with HubServer() as hub:
        hub.add_repository(REPOSITORY, release)
        api = connect(hub)
        with pytest.raises(RepositoryNotFoundError):
            api.repo_info("acme/nothing")
        with pytest.raises(RevisionNotFoundError):
            api.repo_info(REPOSITORY, revision="v9")
        with pytest.raises(EntryNotFoundError):
            hf_hub_download(REPOSITORY, "nothing", endpoint=hub.endpoint, cache_dir=release, token="any")
        assert fetch(f"{hub.endpoint}/api/agent-harnesses")[0] == 404


def test_the_token_decides_who_reads_and_writes(connect: Connect, release: Path) -> None:
    with HubServer(token="secret", organisations=["acme"]) as hub:
        hub.add_repository("acme/private", release, private=True)
        hub.add_repository("acme/public", release)
        owner, reader, nobody = connect(hub, "secret"), connect(hub, "read:secret"), connect(hub, token=False)
        user = owner.whoami()
        assert ([org["name"] for org in user["orgs"]], user["auth"]["accessToken"]["role"]) == (["acme"], "write")
        assert reader.whoami()["auth"]["accessToken"]["role"] == "read"
        owner.auth_check("acme/private")
        assert reader.repo_info("acme/private").private
        assert not nobody.repo_info("acme/public").private
        with pytest.raises(RepositoryNotFoundError):
            nobody.repo_info("acme/private")
        expected = {"stranger": 401, "read:secret": 403, False: 401}
        for token, status in expected.items():
            with pytest.raises(HfHubHTTPError) as refused:
                change = [CommitOperationAdd("a", b"a")]
                connect(hub, token).create_commit("acme/public", change, commit_message="a")
            assert refused.value.response.status_code == status
        with pytest.raises(HfHubHTTPError) as stranger:
            connect(hub, "stranger").repo_info("acme/public")
        assert stranger.value.response.status_code == 401
        with pytest.raises(HfHubHTTPError) as elsewhere:
            owner.create_repo("other/model")
        assert elsewhere.value.response.status_code == 403
        owner.create_commit("acme/public", [CommitOperationAdd("a", b"a")], commit_message="a")


def test_a_trusted_publisher_writes_to_one_repository_only(connect: Connect, release: Path) -> None:
    with HubServer(token="secret") as hub:
        hub.add_repository(REPOSITORY, release)
        hub.add_repository("acme/other", release)
        asked = {
            "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
            "subject_token_type": "urn:ietf:params:oauth:token-type:id_token",
            "subject_token": "aGVhZA.eyJzdWIiOiAiY2kifQ.c2ln",
            "resource": REPOSITORY,
        }
        status, content, _ = fetch(f"{hub.endpoint}/oauth/token", "POST", json.dumps(asked).encode())
        assert (status, json.loads(content)["expires_in"]) == (200, 3600)
        api = connect(hub, json.loads(content)["access_token"])
        api.create_commit(REPOSITORY, [CommitOperationAdd("a", b"a")], commit_message="a")
        with pytest.raises(HfHubHTTPError, match="You don't have write access to acme/other"):
            api.create_commit("acme/other", [CommitOperationAdd("a", b"a")], commit_message="a")
        with pytest.raises(HfHubHTTPError, match="401"):
            api.create_repo("acme/new")
        asked["subject_token"] = "no token"
        status, content, _ = fetch(f"{hub.endpoint}/oauth/token", "POST", json.dumps(asked).encode())
        assert (status, json.loads(content)["error"]) == (400, "invalid_grant")


def test_a_card_is_checked_before_anything_is_sent(connect: Connect, release: Path) -> None:
    (release / "README.md").write_text(CARD.replace("acme/base", "/models/base"))
    with HubServer() as hub:
        with pytest.raises(ValueError, match='"base_model" with value "/models/base" is not valid'):
            publish(connect(hub), release)
        assert not any("/commit/" in record.path for record in hub.requests)


def test_collections_take_a_repository_once(connect: Connect, release: Path) -> None:
    with HubServer() as hub:
        hub.add_repository(REPOSITORY, release)
        api = connect(hub)
        slug = api.create_collection("Our releases", namespace="acme", exists_ok=True).slug
        for _ in range(2):
            api.add_collection_item(slug, REPOSITORY, "model", note="bf16", exists_ok=True)
        assert api.create_collection("Our releases", namespace="acme", exists_ok=True).slug == slug
        assert [(item.item_id, item.note) for item in api.get_collection(slug).items] == [(REPOSITORY, "bf16")]
        assert hub.collections == {slug: [{"id": REPOSITORY, "type": "model", "note": "bf16"}]}
        hub.collections["acme/by-hand-1"] = []
        assert api.get_collection("acme/by-hand-1").items == []
        api.delete_collection_item(slug, api.get_collection(slug).items[0].item_object_id)
        assert hub.collections[slug] == []
        with pytest.raises(HfHubHTTPError):
            api.add_collection_item(slug, "acme/nothing", "model")


def test_upload_mode_follows_rules_size_and_content(connect: Connect) -> None:
    with HubServer(limits=Limits(regular_bytes=1000)) as hub:
        api = connect(hub)
        api.create_repo(REPOSITORY)
        files = {"a.safetensors": b"text", "big.json": b" " * 1001, "model.onnx.data": b"a\0b", "small.json": b"{}"}
        change = [CommitOperationAdd(name, content) for name, content in files.items()]
        change.append(CommitOperationAdd("empty.bin", b""))
        api.create_commit(REPOSITORY, change, commit_message="all")
        repository = hub.repositories[REPOSITORY]
        large = {path for path, entry in repository.files().items() if entry.sha256}
        assert large == {"a.safetensors", "big.json", "model.onnx.data"}
        rules = repository.read("main", ".gitattributes").decode()
        assert "big.json filter=lfs" in rules and "a.safetensors" not in rules
        assert len(repository.files()) == 6


def test_gitignore_leaves_files_out(connect: Connect) -> None:
    with HubServer() as hub:
        api = connect(hub)
        api.create_repo(REPOSITORY)
        names = (".gitignore", "kept.txt", "run.log", "cache/a.txt", "cache/keep.log")
        contents = dict.fromkeys(names, b"x") | {".gitignore": b"*.log\ncache/\n!keep.log\n"}
        change = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.create_commit(REPOSITORY, change, commit_message="all")
        assert sorted(hub.repositories[REPOSITORY].files()) == [".gitattributes", ".gitignore", "kept.txt"]


def test_content_that_is_not_what_was_announced_is_refused() -> None:
    with HubServer() as hub:
        create = json.dumps({"name": "model", "organization": "acme"}).encode()
        fetch(f"{hub.endpoint}/api/repos/create", "POST", create)
        oid = hashlib.sha256(b"announced").hexdigest()
        batch = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": 9}]}
        address = f"{hub.endpoint}/{REPOSITORY}.git/info/lfs/objects/batch"
        actions = json.loads(fetch(address, "POST", json.dumps(batch).encode())[1])["objects"][0]["actions"]
        assert fetch(actions["upload"]["href"], "PUT", b"something")[0] == 200
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
