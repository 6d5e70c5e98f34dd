"""Two publishers at once: one commit, and whoever is second says what happened."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qlora_export.errors import ExitCode, ExportError
from qlora_export.testing import HubServer
from tests.publish.hub.conftest import client, create, publish

Library = Mapping[str, str]
# Each test with one of the two clients.
pytestmark = pytest.mark.sampled(1)


def race(hub: HubServer, library: Library, folders: Mapping[Path, str]) -> list[dict[str, Any] | ExportError]:
    """What each publisher of a folder gets, with a message of its own, all started together on the same head."""
    parent = create(client(hub, library))

    def run(folder: Path, description: str) -> dict[str, Any] | ExportError:
        try:
            return publish(client(hub, library), folder, parent, description=description, journal=f"{folder}.ndjson")
        except ExportError as error:
            return error

    with ThreadPoolExecutor(len(folders)) as pool:
        return list(pool.map(run, folders.keys(), folders.values()))


def copy_of(release: Path, name: str) -> Path:
    return Path(shutil.copytree(release, release.parent / name))


def test_one_of_two_releases_wins(hub: HubServer, release: Path, library: Library) -> None:
    folders = [copy_of(release, name) for name in ("first", "second")]
    for folder in folders:
        (folder / "config.json").write_text(f'{{"name": "{folder.name}"}}')
    outcomes = race(hub, library, {folder: folder.name for folder in folders})
    (loser,) = [item for item in outcomes if isinstance(item, ExportError)]
    assert loser.exit_code == ExitCode.REMOTE_CONFLICT
    assert "main moved from" in loser.message
    assert "nothing of this release is on the branch" in loser.hint
    (winner,) = [item for item in outcomes if not isinstance(item, ExportError)]
    repository = hub.repositories["acme/model"]
    assert [commit.oid for commit in repository.commits()][:-1] == [winner["commit"]]
    won = folders[outcomes.index(winner)]
    assert repository.read("main", "config.json") == (won / "config.json").read_bytes()


def test_the_same_release_twice_is_one_commit(hub: HubServer, release: Path, library: Library) -> None:
    outcomes = race(hub, library, {copy_of(release, name): "Invocation 1" for name in ("first", "second", "third")})
    assert not [item for item in outcomes if isinstance(item, ExportError)]
    (commit,) = {item["commit"] for item in outcomes if not isinstance(item, ExportError)}
    assert [item.oid for item in hub.repositories["acme/model"].commits()][:-1] == [commit]


def test_a_foreign_commit_in_between_shows_nothing_of_ours(release: Path, library: Library) -> None:
    with HubServer(faults=["commit-412"]) as hub:
        (refused,) = race(hub, library, {release: "Invocation 1"})
        assert isinstance(refused, ExportError)
        assert refused.exit_code == ExitCode.REMOTE_CONFLICT
        files = set(hub.repositories["acme/model"].files())
        assert files == {".gitattributes", "ANOTHER-PUBLISHER.md"}


def test_a_listing_that_lags_behind_our_lost_commit(release: Path, library: Library) -> None:
    with HubServer(faults=["commit-applied-then-closed", "tree-missing-shard"]) as hub:
        (made,) = race(hub, library, {release: "Invocation 1"})
        assert not isinstance(made, ExportError)
        assert [item.oid for item in hub.repositories["acme/model"].commits()][:-1] == [made["commit"]]
