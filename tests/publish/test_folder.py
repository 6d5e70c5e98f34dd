from __future__ import annotations

import json
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_export.drift.results import Drift, Verdict, Verified
from qlora_export.engine import BuildOptions, build
from qlora_export.errors import EnvironmentProblem, RemoteConflict, UsageError, VerifyMismatch
from qlora_export.planning.make import make_plan
from qlora_export.publish.base import Account
from qlora_export.publish.folder import FolderPublisher
from qlora_export.recipe.load import make_recipe
from tests.drift.test_gate import PERFECT
from tests.helpers.files import folder_bytes
from tests.processes import forked

ACCOUNT = Account({})


@pytest.fixture(scope="module")
def verified(pico_base: Path, pico_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Verified:
    """A finished artifact with a passing verdict."""
    out = tmp_path_factory.mktemp("published")
    data = {"base": str(pico_base), "adapter": str(pico_adapter), "artifacts": ["nf4-adapter"]}
    (artifact,) = build(make_plan(make_recipe(data, Path(), "test"), out), out, BuildOptions())
    return Verified(artifact, Verdict("pass"), Drift(**PERFECT))


def publisher(place: Path, version: str | None = None) -> Any:
    return FolderPublisher(str(place), version, Path())


def test_what_lies_in_the_registry_is_the_artifact(verified: Verified, tmp_path: Path) -> None:
    (receipt,) = publisher(tmp_path / "registry", "v1").publish([verified], ACCOUNT)
    shelf = tmp_path / "registry/nf4-adapter"
    assert folder_bytes(shelf / "v1") == folder_bytes(verified.artifact.path)
    assert (shelf / "latest").readlink() == Path("v1")
    assert json.loads((shelf / "v1.receipt.json").read_text())["files"] == receipt.files
    assert set(receipt.files) == set(folder_bytes(shelf / "v1"))
    assert not any(path.stat().st_mode & 0o222 for path in (shelf / "v1").rglob("*") if path.is_file())


def test_publishing_twice_changes_nothing(verified: Verified, tmp_path: Path) -> None:
    first = publisher(tmp_path).publish([verified], ACCOUNT)

    def stamps() -> dict[str, int]:
        return {str(path): path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}

    before = stamps()
    assert publisher(tmp_path).publish([verified], ACCOUNT) == first
    assert stamps() == before
    assert first[0].destination.endswith(verified.artifact.manifest_sha256[:12])


def test_a_relative_place_starts_at_the_recipe(verified: Verified, tmp_path: Path) -> None:
    FolderPublisher("out/registry", "v1", tmp_path).publish([verified], ACCOUNT)
    assert (tmp_path / "out/registry/nf4-adapter/v1/manifest.json").is_file()


@pytest.mark.parametrize("harm", ["byte", "stray", "missing"])
def test_a_version_with_other_bytes_is_a_conflict(verified: Verified, tmp_path: Path, harm: str) -> None:
    publisher(tmp_path, "v1").publish([verified], ACCOUNT)
    place = tmp_path / "nf4-adapter/v1"
    if harm == "byte":
        (place / "config.json").chmod(0o644)
        (place / "config.json").write_text("{}")
    elif harm == "stray":
        (place / "virus.py").write_text("")
    else:
        (place / "config.json").unlink()
    before = folder_bytes(tmp_path)
    with pytest.raises(RemoteConflict, match="exists with another"):
        publisher(tmp_path, "v1").publish([verified], ACCOUNT)
    assert folder_bytes(tmp_path) == before
    publisher(tmp_path, "v2").publish([verified], ACCOUNT)
    assert (tmp_path / "nf4-adapter/latest").readlink() == Path("v2")


def test_a_folder_that_is_no_registry_is_left_alone(verified: Verified, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="no registry of ours"):
        publisher(tmp_path).publish([verified], ACCOUNT)
    assert folder_bytes(tmp_path) == {"thesis.txt": b"precious"}
    (tmp_path / "registry.json").write_text('{"schema": 2}')
    with pytest.raises(UsageError, match="not the marker"):
        publisher(tmp_path).publish([verified], ACCOUNT)


def test_an_artifact_that_changed_after_the_gate_is_not_published(verified: Verified, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(verified.artifact.path, tmp_path / "copy"))
    (copy / "config.json").write_text("{}")
    changed = replace(verified, artifact=replace(verified.artifact, path=copy))
    with pytest.raises(VerifyMismatch, match="changed while it was published"):
        publisher(tmp_path / "registry", "v1").publish([changed], ACCOUNT)
    assert (
        not list((tmp_path / "registry").glob("nf4-adapter/[!.]*/manifest.json"))
        or not (tmp_path / "registry/nf4-adapter/latest").exists()
    )


CHILD = """
import os, signal, sys
from pathlib import Path
from qlora_export.publish.base import Account
from qlora_export.artifact import Artifact
from qlora_export.drift.results import Drift, Verdict, Verified
from qlora_export.artifact import read_artifact
from qlora_export.publish import folder as module

source, place, point = sys.argv[1:]
count = 0

def dying(function):
    def call(*arguments, **words):
        global count
        if count == int(point):
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return function(*arguments, **words)
    return call

module.shutil.copyfile = dying(module.shutil.copyfile)
module.sync_folder = dying(module.sync_folder)
module._point = dying(module._point)
module._write_whole = dying(module._write_whole)
verified = Verified(read_artifact(Path(source)), Verdict("pass"), Drift(*([1.0] * 14)))
module.FolderPublisher(place, "v1", Path()).publish([verified], Account({}))
"""


@pytest.mark.parametrize("point", range(18))
def test_a_publication_killed_at_any_step_is_finished_by_the_next(
    verified: Verified, tmp_path: Path, point: int
) -> None:
    child = forked("-c", CHILD, verified.artifact.path, tmp_path / "registry", point)
    shelf = tmp_path / "registry/nf4-adapter"
    if os.path.lexists(shelf / "latest"):
        assert folder_bytes(shelf / "latest") == folder_bytes(verified.artifact.path)
    publisher(tmp_path / "registry", "v1").publish([verified], ACCOUNT)
    assert folder_bytes(shelf / "v1") == folder_bytes(verified.artifact.path), child.stderr
    assert {path.name for path in shelf.iterdir()} == {"v1", "v1.receipt.json", "latest"}


def test_latest_does_not_go_back_when_an_old_version_is_published_again(verified: Verified, tmp_path: Path) -> None:
    for version in ("v1", "v2", "v1"):
        publisher(tmp_path, version).publish([verified], ACCOUNT)
    assert (tmp_path / "nf4-adapter/latest").readlink() == Path("v2")


def test_all_or_nothing(verified: Verified, tmp_path: Path) -> None:
    """A conflict of the second artifact keeps the first one out, too."""
    publisher(tmp_path, "v1").publish([verified], ACCOUNT)
    other = replace(verified, artifact=replace(verified.artifact, name="other"))
    (tmp_path / "nf4-adapter/v1/config.json").unlink()
    with pytest.raises(RemoteConflict):
        publisher(tmp_path, "v1").publish([other, verified], ACCOUNT)
    assert not (tmp_path / "other/v1").exists()
    assert not (tmp_path / "other/latest").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[]", b'{"schema": 2}'])
def test_a_marker_that_is_not_ours(verified: Verified, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "registry.json").write_bytes(content)
    for attempt in (
        lambda: publisher(tmp_path).publish([verified], ACCOUNT),
        lambda: publisher(tmp_path).require_ready([]),
    ):
        with pytest.raises(UsageError, match="not the marker"):
            attempt()


def test_a_marker_killed_half_way_is_written_again(verified: Verified, tmp_path: Path) -> None:
    (tmp_path / ".registry.json.partial").write_text("{")
    publisher(tmp_path, "v1").publish([verified], ACCOUNT)
    assert (tmp_path / "nf4-adapter/v1").is_dir()


def test_a_registry_in_a_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(UsageError, match="lies in the source"):
        publisher(tmp_path / "base/registry").require_ready([tmp_path / "base"])


def test_a_full_disk_publishes_nothing(verified: Verified, tmp_path: Path) -> None:
    """A real limit on the size of files stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(EnvironmentProblem, match="no space for"):
            publisher(tmp_path, "v1").publish([verified], ACCOUNT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "nf4-adapter/v1").exists()
    assert not (tmp_path / "nf4-adapter/latest").exists()
    publisher(tmp_path, "v1").publish([verified], ACCOUNT)
    assert {path.name for path in (tmp_path / "nf4-adapter").iterdir()} == {"v1", "v1.receipt.json", "latest"}
