"""Who may read and write, and how the Hub says no."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qlora_export.testing import HubServer
from tests.testing.conftest import CLIENT_WARNING, REPOSITORY, Connect, fetch

pytestmark = pytest.mark.filterwarnings(CLIENT_WARNING)


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
        for wrong in ({"subject_token": "no token"}, {"resource": "acme/nothing"}, {"grant_type": "password"}):
            status, content, _ = fetch(f"{hub.endpoint}/oauth/token", "POST", json.dumps(asked | wrong).encode())
            expected = "unsupported_grant_type" if "grant_type" in wrong else "invalid_grant"
            assert (status, json.loads(content)["error"]) == (400, expected)


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
