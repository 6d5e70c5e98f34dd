"""Endpoints of other kinds: an address with a path, no xet or with it, and not every request known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from qlora_export.publish.hub.job import Target
from qlora_export.publish.hub.process import run_job
from qlora_export.testing import HubServer, Limits
from tests.publish.hub.conftest import client, create, publish

# Each test with one of the two clients.
pytestmark = pytest.mark.sampled(1)
PREFIX = "/artifactory/api/huggingfaceml/models"
WITHOUT = ("/whoami-v2", "/auth-check", "/commits/", "/xet-write-token/", "/refs", "/collections")
FAULTS = ["commit-applied-then-closed", "put-500", "tree-missing-shard"]


@pytest.fixture
def endpoint() -> Iterator[HubServer]:
    rules: dict[str, Any] = {"prefix": PREFIX, "without": WITHOUT, "limits": Limits(page_rows=2)}
    with HubServer(token="reference.token", faults=FAULTS, **rules) as server:
        yield server


def test_a_release_to_an_artifact_server(endpoint: HubServer, release: Path, library: Mapping[str, str]) -> None:
    assert endpoint.endpoint.endswith(PREFIX)
    runner = client(endpoint, {**library, "HF_TOKEN": "reference.token"})
    assert run_job(runner, "authorise") == {"name": None}
    made = publish(runner, release, create(runner))
    repository = endpoint.repositories["acme/model"]
    assert [commit.oid for commit in repository.commits()][:-1] == [made["commit"]]
    assert made["url"] == f"{endpoint.endpoint}/acme/model"
    assert not [record.path for record in endpoint.requests if not record.path.startswith(PREFIX)]
    commits = [{"repository": "acme/model", "commit": made["commit"]}]
    assert run_job(runner, "name", commits=commits, version=None, collection=None) == {}
    seen = run_job(runner, "look", targets=[vars(Target("acme/model"))], texts=["README.md"])["seen"][0]
    assert seen["head"] == made["commit"]


def test_what_is_not_known_is_a_404(endpoint: HubServer) -> None:
    with HubServer(prefix="/hub") as server:
        outside = client(server, {"HF_ENDPOINT": server.endpoint.removesuffix("/hub")})
        assert run_job(outside, "authorise") == {"name": None}
        assert run_job(client(server, {}), "authorise") == {"name": "rehearsal"}


@pytest.mark.sampled(1, per="allowed")
@pytest.mark.parametrize("allowed", [True, False])
def test_xet_is_used_where_it_is_spoken(
    release: Path, library: Mapping[str, str], allowed: bool, tmp_path: Path
) -> None:
    """The client's own library sends the bytes; this Hub keeps none of them, so its listing is all that is compared."""
    variables = {**library, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "" if allowed else "1"}
    with HubServer(xet=True, faults=["commit-applied-then-closed"]) as hub:
        runner = client(hub, variables)
        created = run_job(runner, "create", targets=[vars(Target("acme/model"))])
        assert created["xet"] == allowed
        made = publish(runner, release, created["heads"][0])
        files = hub.repositories["acme/model"].files()
        for path in release.glob("*.safetensors"):
            assert files[path.name].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert [commit.oid for commit in hub.repositories["acme/model"].commits()][:-1] == [made["commit"]]
        taken = {record.path.split("/")[1] for record in hub.requests if record.method in ("PUT", "POST")}
        assert ("xet" in taken, "uploads" in taken) == (allowed, not allowed)
