"""The publisher `folder:PATH`: a local registry with one immutable folder per version.

    PATH/registry.json              says that the registry is ours
    PATH/NAME/VERSION/              the artifact, files read-only
    PATH/NAME/VERSION.receipt.json  what was read back
    PATH/NAME/latest -> VERSION     moved by one rename

A version is copied beside its place, read back, and renamed. Publishing the same bytes again changes nothing; other
bytes under a version that exists are a conflict. The default version is the first digits of the manifest's sha256.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from qlora_export.contracts import Artifact, Receipt, Verified
from qlora_export.engine.manifest import file_facts
from qlora_export.engine.partial import sync_folder
from qlora_export.errors import RemoteConflict, UsageError, VerifyMismatch

MARKER_NAME = "registry.json"
MARKER = {"schema": 1, "kind": "qlora-export registry"}
LATEST = "latest"
VERSION_DIGITS = 12


class FolderPublisher:
    """Publishes into one registry; `version` None stands for the digest prefix."""

    def __init__(self, place: str, version: str | None, folder: Path) -> None:
        self._registry = folder / Path(place).expanduser()
        self._version = version

    def publish(self, verified: Verified) -> Receipt:
        """Copy, read back, rename; raises RemoteConflict when the version exists with other bytes."""
        artifact = verified.artifact
        version = self._version or artifact.manifest_sha256[:VERSION_DIGITS]
        with _opened(self._registry):
            shelf = self._registry / artifact.name
            shelf.mkdir(exist_ok=True)
            final = shelf / version
            if not os.path.lexists(final):
                _store(artifact, final)
            receipt = Receipt(artifact.name, str(final), artifact.manifest_sha256, _read_back(artifact, final))
            _write_whole(shelf / f"{version}.receipt.json", json.dumps(asdict(receipt), indent=2) + "\n")
            _point(shelf / LATEST, version)
        return receipt


@contextmanager
def _opened(registry: Path) -> Iterator[None]:
    """The registry, made if need be and locked; raises UsageError when the folder is not a registry of ours."""
    hint = "give an empty or new folder, or a registry made by qlora-export"
    if registry.exists() and not registry.is_dir():
        raise UsageError(f"{registry}: is a file", hint)
    registry.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(registry, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        marker = registry / MARKER_NAME
        if not marker.exists():
            if any(registry.iterdir()):
                raise UsageError(f"{registry}: is not empty and no registry of ours (no {MARKER_NAME})", hint)
            _write_whole(marker, json.dumps(MARKER) + "\n")
        if json.loads(marker.read_text(encoding="utf-8")) != MARKER:
            raise UsageError(f"{marker}: not the marker of a registry of this version", hint)
        yield
    finally:
        os.close(descriptor)


def _store(artifact: Artifact, final: Path) -> None:
    """Copy the artifact beside its place and rename it there once the copy reads back as the manifest says."""
    partial = final.with_name(f"{final.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    for name in ("manifest.json", *artifact.manifest["files"]):
        target = partial / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.path / name, target, follow_symlinks=False)
        target.chmod(target.stat().st_mode & ~0o222)
        with target.open("rb") as file:
            os.fsync(file.fileno())
    try:
        _read_back(artifact, partial)
    except RemoteConflict as error:
        raise VerifyMismatch(f"{artifact.path}: changed while it was published: {error.message}", error.hint) from None
    for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        sync_folder(folder)
    partial.rename(final)
    sync_folder(final.parent)


def _read_back(artifact: Artifact, folder: Path) -> dict[str, str]:
    """sha256 of every file in the registry; raises RemoteConflict when they are not the artifact's."""
    expected = {name: str(facts["sha256"]) for name, facts in artifact.manifest["files"].items()}
    expected["manifest.json"] = artifact.manifest_sha256
    found = {
        str(path.relative_to(folder)): "a link" if path.is_symlink() else str(file_facts(path)["sha256"])
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }
    for name in sorted(set(expected) | set(found)):
        if expected.get(name) != found.get(name):
            raise RemoteConflict(
                f"{folder}: exists with another {name} ({found.get(name, 'missing')[:12]}, "
                f"ours is {expected.get(name, 'absent')[:12]})",
                "a version never changes: publish under another version",
            )
    return found


def _point(link: Path, version: str) -> None:
    """Make `latest` point to the version, in one step."""
    if link.is_symlink() and link.readlink() == Path(version):
        return
    partial = link.with_name(f".{link.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(version)
    partial.rename(link)
    sync_folder(link.parent)


def _write_whole(path: Path, text: str) -> None:
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)
