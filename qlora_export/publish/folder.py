"""The publisher `folder:PATH`: a local registry with one immutable folder per version.

    PATH/registry.json              says that the registry is ours
    PATH/NAME/VERSION/              the artifact, files read-only
    PATH/NAME/VERSION.receipt.json  what was read back
    PATH/NAME/latest -> VERSION     moved by one rename

All artifacts of a release are copied beside their places and read back before the first one gets its name; only then
are receipts written and `latest` moved. Publishing the same bytes again changes nothing, `latest` included; other bytes
under a version that exists are a conflict. The default version is the first digits of the manifest's sha256. Names that
begin with a dot and end in `.partial` are ours to remove.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from qlora_export.artifact import Artifact, file_facts
from qlora_export.drift.results import Verified
from qlora_export.engine.build import disk_errors
from qlora_export.engine.partial_folder import sync_folder
from qlora_export.errors import RemoteConflict, UsageError, VerifyMismatch
from qlora_export.publish.base import Account
from qlora_export.recipe.config import Recipe
from qlora_export.report.run import Receipt

MARKER_NAME = "registry.json"
MARKER_PARTIAL = f".{MARKER_NAME}.partial"
MARKER = {"schema": 1, "kind": "qlora-export registry"}
LATEST = "latest"
VERSION_DIGITS = 12
RECEIPT_KEYS = ("artifact", "destination", "commit", "files")


@dataclass(frozen=True)
class _Place:
    """Where one artifact goes."""

    artifact: Artifact
    shelf: Path
    version: str

    @property
    def final(self) -> Path:
        return self.shelf / self.version

    @property
    def partial(self) -> Path:
        return self.shelf / f".{self.version}.partial"

    @property
    def receipt(self) -> Path:
        return self.shelf / f"{self.version}.receipt.json"


class FolderPublisher:
    """Publishes into one registry; `version` None stands for the digest prefix."""

    def __init__(self, place: str, version: str | None, folder: Path) -> None:
        self._registry = folder / Path(place).expanduser()
        self._version = version

    def require_ready(self, forbidden: Sequence[Path]) -> None:
        """Raise UsageError when the folder is not a registry of ours and not empty, or lies in one of these."""
        place = self._registry.absolute().resolve()
        for folder in forbidden:
            if folder.resolve() in (place, *place.parents):
                raise UsageError(f"{self._registry}: lies in the source {folder}", "publish to another folder")
        _require_ours(self._registry)

    def require_account(self, account: Account) -> None:
        """Nothing: a folder tells what its manifest tells."""

    def publish(self, verified: Sequence[Verified], account: Account) -> list[Receipt]:
        """Stage everything, then name it; raises RemoteConflict when a version exists with other bytes."""
        places = [self._place(item.artifact) for item in verified]
        with _opened(self._registry):
            for place in places:
                place.shelf.mkdir(exist_ok=True)
                if os.path.lexists(place.final):
                    _read_back(place.artifact, place.final)
                else:
                    _stage(place)
            for place in places:
                if not os.path.lexists(place.final):
                    place.partial.rename(place.final)
                    sync_folder(place.shelf)
            return [_receive(place) for place in places]

    @contextmanager
    def fetch(self, receipt: Receipt) -> Iterator[Path]:
        """The version's own folder."""
        yield Path(receipt.destination)

    def conclude(self, receipts: Sequence[Receipt]) -> None:
        """Nothing: a version of a registry has its name since it was published."""

    def _place(self, artifact: Artifact) -> _Place:
        version = self._version or artifact.manifest_sha256[:VERSION_DIGITS]
        return _Place(artifact, self._registry / artifact.name, version)


def open_registry(recipe: Recipe, out: Path, environment: Mapping[str, str]) -> FolderPublisher:
    """The registry that a recipe publishes to."""
    publish = recipe.publish
    if publish is None:
        raise UsageError("the recipe has no publish.to", "add `publish: {to: folder:PATH}`")
    return FolderPublisher(publish.to.partition(":")[2], publish.version, recipe.folder)


def _receive(place: _Place) -> Receipt:
    """Read a version back, point `latest` to it if it is new, and write its receipt last."""
    found = _read_back(place.artifact, place.final)
    receipt = Receipt(place.artifact.name, str(place.final), place.artifact.manifest_sha256, found)
    facts = {key: value for key, value in asdict(receipt).items() if key in RECEIPT_KEYS}
    text = json.dumps(facts, indent=2) + "\n"
    if not place.receipt.exists() or place.receipt.read_text(encoding="utf-8") != text:
        _point(place.shelf / LATEST, place.version)
        _write_whole(place.receipt, text)
    return receipt


def _require_ours(registry: Path) -> None:
    """Raise UsageError unless the folder is absent, empty, or a registry of this version."""
    hint = "give an empty or new folder, or a registry made by qlora-export"
    if not registry.exists():
        return
    if not registry.is_dir():
        raise UsageError(f"{registry}: is a file", hint)
    marker = registry / MARKER_NAME
    if not marker.exists():
        if any(path.name != MARKER_PARTIAL for path in registry.iterdir()):
            raise UsageError(f"{registry}: is not empty and no registry of ours (no {MARKER_NAME})", hint)
        return
    try:
        found = json.loads(marker.read_bytes())
    except ValueError:
        found = None
    if found != MARKER:
        raise UsageError(f"{marker}: not the marker of a registry of this version", hint)


@contextmanager
def _opened(registry: Path) -> Iterator[None]:
    """The registry, made if need be and locked; raises UsageError when the folder is not a registry of ours."""
    _require_ours(registry)
    registry.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(registry, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not (registry / MARKER_NAME).exists():
            _write_whole(registry / MARKER_NAME, json.dumps(MARKER) + "\n")
        yield
    finally:
        os.close(descriptor)


def _stage(place: _Place) -> None:
    """Copy an artifact beside its place, read-only, and read the copy back."""
    artifact, partial = place.artifact, place.partial
    if partial.exists():
        shutil.rmtree(partial)
    with disk_errors(place.shelf, artifact.bytes):
        for name in artifact.digests:
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


def _read_back(artifact: Artifact, folder: Path) -> dict[str, str]:
    """sha256 of every file in the registry; raises RemoteConflict when they are not the artifact's."""
    expected = artifact.digests
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
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_folder(path.parent)
