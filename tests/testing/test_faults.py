"""Each fault as the real client meets it, and what is on the Hub afterwards."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from qlora_export.testing import FAULTS, HubServer, Limits
from qlora_export.testing.faults import Faults
from tests.testing.conftest import CLIENT_WARNING, Connect, fetch

pytestmark = pytest.mark.filterwarnings(CLIENT_WARNING)
REPOSITORY = "acme/model"
SHARD = "model.safetensors"
CONTENT = bytes(range(256)) * 40


@contextmanager
def started(*faults: str, **options: Any) -> Iterator[HubServer]:
    with HubServer(faults=faults, **options) as hub:
        yield hub


def release(api: HfApi, **options: Any) -> Any:
    api.create_repo(REPOSITORY, private=True, exist_ok=True)
    change = [CommitOperationAdd(SHARD, CONTENT), CommitOperationAdd("config.json", b"{}")]
    return api.create_commit(REPOSITORY, change, commit_message="release", **options)


def titles(hub: HubServer) -> list[str]:
    return [commit.title for commit in hub.repositories[REPOSITORY].commits()]


@pytest.mark.parametrize(
    ("fault", "waited"),
    [
        ("preupload-429-retry-after", [2.0]),
        ("preupload-429-ratelimit", [2.0]),
        ("put-500", [1]),
        ("verify-502", [1]),
    ],
)
def test_what_the_client_overcomes_by_itself(
    connect: Connect, waits: list[float], fault: str, waited: list[float]
) -> None:
    with started(fault) as hub:
        release(connect(hub))
        assert waits == waited
        assert hub.repositories[REPOSITORY].read("main", SHARD) == CONTENT
        statuses = {record.status for record in hub.requests}
        assert {"preupload": 429, "put": 500, "verify": 502}[fault.split("-")[0]] in statuses


@pytest.mark.parametrize("part_bytes", [10**6, 3000])
def test_a_truncated_upload_shows_in_size_and_hash(connect: Connect, part_bytes: int) -> None:
    with started("put-truncated", limits=Limits(part_bytes=part_bytes)) as hub:
        api = connect(hub)
        commit = release(api)
        row = api.get_paths_info(REPOSITORY, [SHARD], revision=commit.oid)[0]
        assert (row.size, row.lfs.size) == (len(CONTENT) // 2, len(CONTENT) // 2)
        assert hub.repositories[REPOSITORY].read("main", SHARD) == CONTENT[: len(CONTENT) // 2]
        release(api)
        assert hub.repositories[REPOSITORY].read("main", SHARD) == CONTENT


def test_a_slow_upload_outlasts_a_timeout(connect: Connect) -> None:
    with started("put-slow:30") as hub:
        connect(hub).create_repo(REPOSITORY)
        batch = f"/{REPOSITORY}.git/info/lfs/objects/batch"
        oid = "0" * 64
        body = f'{{"operation": "upload", "objects": [{{"oid": "{oid}", "size": 9}}]}}'
        with socket.create_connection(("127.0.0.1", int(hub.endpoint.rsplit(":", 1)[1])), timeout=0.3) as connection:
            connection.sendall(f"POST {batch} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            found = re.search(rb"/uploads/[0-9a-f]+", connection.recv(10_000))
            assert found is not None
            connection.sendall(f"PUT {found[0].decode()} HTTP/1.1\r\nContent-Length: 9\r\n\r\n123456789".encode())
            with pytest.raises(TimeoutError):
                connection.recv(10)


@pytest.mark.parametrize(("fault", "lasts"), [("commit-503", False), ("commit-503-always", True)])
def test_a_commit_that_is_not_taken(connect: Connect, fault: str, lasts: bool) -> None:
    with started(fault) as hub:
        api = connect(hub)
        with pytest.raises(HfHubHTTPError, match="503"):
            release(api)
        assert titles(hub) == ["initial commit"]
        if lasts:
            with pytest.raises(HfHubHTTPError, match="503"):
                release(api)
        else:
            release(api)
        assert len(titles(hub)) == (1 if lasts else 2)


@pytest.mark.parametrize(("fault", "applied"), [("commit-closed-before", False), ("commit-applied-then-closed", True)])
def test_a_connection_that_closes_at_the_commit(connect: Connect, fault: str, applied: bool) -> None:
    with started(fault) as hub:
        api = connect(hub)
        with pytest.raises(Exception, match="disconnected"):
            release(api)
        assert titles(hub) == (["release", "initial commit"] if applied else ["initial commit"])
        assert [record.status for record in hub.requests if "/commit/" in record.path] == [0]
        release(api)
        assert titles(hub) == ["release", "initial commit"]


def test_another_publisher_comes_first(connect: Connect) -> None:
    with started("commit-412") as hub:
        api = connect(hub)
        api.create_repo(REPOSITORY)
        parent = hub.repositories[REPOSITORY].head()
        with pytest.raises(HfHubHTTPError, match="412"):
            release(api, parent_commit=parent)
        assert titles(hub) == ["Another publisher's commit", "initial commit"]
        assert "ANOTHER-PUBLISHER.md" in hub.repositories[REPOSITORY].files()


def test_a_listing_misses_a_shard_once_after_a_commit(connect: Connect) -> None:
    with started("tree-missing-shard") as hub:
        api = connect(hub)
        commit = release(api)
        seen = [{row.path for row in api.list_repo_tree(REPOSITORY, recursive=True, revision=commit.oid)} for _ in "ab"]
        assert seen == [{".gitattributes", "config.json"}, {".gitattributes", "config.json", SHARD}]


def test_the_tag_is_taken_by_another_commit(connect: Connect) -> None:
    with started("tag-409") as hub:
        api = connect(hub)
        commit = release(api)
        with pytest.raises(HfHubHTTPError, match="409"):
            api.create_tag(REPOSITORY, tag="v1", revision=commit.oid)
        repository = hub.repositories[REPOSITORY]
        assert repository.tags == {"v1": repository.commits()[-1].oid}
        assert repository.tags["v1"] != commit.oid


@pytest.mark.parametrize(
    ("fault", "refused"), [("token-401-mid-run", "/commit/main"), ("token-401-mid-run:2", "/objects/batch")]
)
def test_the_token_expires_for_good(connect: Connect, fault: str, refused: str) -> None:
    with started(fault) as hub:
        api = connect(hub)
        for work in (lambda: release(api), lambda: api.repo_info(REPOSITORY)):
            with pytest.raises(HfHubHTTPError, match="401"):
                work()
        assert titles(hub) == ["initial commit"]
        assert next(record.path for record in hub.requests if record.status == 401).endswith(refused)
        assert connect(hub, token=False).repo_info(REPOSITORY).private


def test_a_repository_that_cannot_be_created(connect: Connect) -> None:
    with started("create-403") as hub:
        with pytest.raises(HfHubHTTPError, match="403"):
            connect(hub).create_repo(REPOSITORY)
        assert not hub.repositories


def test_a_private_repository_reads_back_as_public(connect: Connect) -> None:
    with started("repository-turns-public") as hub:
        api = connect(hub)
        api.create_repo(REPOSITORY, private=True)
        assert api.repo_info(REPOSITORY).private is False
        api.create_repo("acme/second", private=True)
        assert api.repo_info("acme/second").private is True


def test_a_refusal_repeats_the_token_it_was_sent() -> None:
    with started("refusals-tell-token", token="right") as hub:
        for _ in range(2):
            status, content, _ = fetch(f"{hub.endpoint}/api/whoami-v2", Authorization="Bearer wrong")
            assert (status, b"Bearer wrong" in content) == (401, True)
        assert b"Bearer" not in fetch(f"{hub.endpoint}/api/whoami-v2", Authorization="Bearer right")[1]


def test_every_fault_is_tried_here() -> None:
    source = Path(__file__).read_text()
    assert [name for name in FAULTS if f'"{name}' not in source] == []


def test_a_fault_given_twice_fires_twice() -> None:
    faults = Faults(["put-500", "put-500", "put-slow:2.5"])
    assert [faults.strikes("put-500") for _ in range(3)] == [True, True, False]
    assert (faults.seconds("put-slow", 60), faults.seconds("other", 60)) == (2.5, 60)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("put-50", "put-50: no such fault; is it put-500?"),
        ("xyzzy", "xyzzy: no such fault; there are create-403, "),
        ("put-500:3", "put-500:3: put-500 takes no number"),
        ("put-slow:soon", "put-slow:soon: 'soon' is no number"),
    ],
)
def test_a_fault_that_does_not_exist(name: str, says: str) -> None:
    with pytest.raises(ValueError, match="fault|number") as refused:
        Faults([name])
    assert says in str(refused.value)
