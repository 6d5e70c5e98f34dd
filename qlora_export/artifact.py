"""A finished folder and its manifest `manifest.json`: reading one, and holding its files to the digests in it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_export.errors import InputError, UsageError, VerifyMismatch
from qlora_export.tensors.reading import BeforeWait, read_at

CHUNK_BYTES = 1 << 19
MANIFEST_NAME = "manifest.json"
FileFacts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Artifact:
    """A finished folder: its manifest has been written and its bytes agree with it."""

    name: str
    format: str
    path: Path
    manifest: Mapping[str, Any]
    manifest_sha256: str
    reused: bool = False

    @property
    def runtime(self) -> str:
        """Name of the runtime that opens it."""
        return str(self.manifest["runtime"])

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(int(entry["bytes"]) for entry in self.manifest["files"].values())

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of every file and of the manifest, by name."""
        files = {name: str(entry["sha256"]) for name, entry in self.manifest["files"].items()}
        return {**files, MANIFEST_NAME: self.manifest_sha256}


def file_facts(path: Path, before_wait: BeforeWait = lambda: None) -> dict[str, Any]:
    """Size and sha256 of a file, which is read once from its beginning."""
    digest, position, chunk = hashlib.sha256(), 0, memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := read_at(file.fileno(), chunk, position, before_wait):
            digest.update(chunk[:count])
            position += count
    return {"bytes": position, "sha256": digest.hexdigest()}


def read_artifact(folder: Path) -> Artifact:
    """A finished folder by its manifest; raises UsageError when it is not one of ours."""
    path = folder / MANIFEST_NAME
    hint = "choose another --out, or move the folder away"
    if not path.is_file():
        raise UsageError(f"{folder}: exists and is no artifact of ours (no {MANIFEST_NAME})", hint)
    raw = path.read_bytes()
    try:
        manifest = json.loads(raw)
        name, form = str(manifest["name"]), str(manifest["format"])
        digest, files = manifest["plan_digest"], manifest["files"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path}: no manifest of ours", hint) from None
    if not isinstance(digest, str) or not isinstance(files, dict):
        raise UsageError(f"{path}: no manifest of ours", hint)
    return Artifact(name, form, folder, manifest, hashlib.sha256(raw).hexdigest())


def verify_artifact(artifact: Artifact, planned: Iterable[str]) -> None:
    """Compare a finished folder with its manifest and the planned names; raises VerifyMismatch naming a file."""
    hint = f"the folder was changed after it was built; remove {artifact.path} and build again"
    on_disk = {str(path.relative_to(artifact.path)) for path in artifact.path.rglob("*") if not path.is_dir()}
    for name in sorted(set(planned) ^ set(artifact.manifest["files"])):
        raise VerifyMismatch(f"{artifact.path / MANIFEST_NAME}: {name} is listed or planned, but not both", hint)
    for name in sorted(on_disk - set(artifact.manifest["files"]) - {MANIFEST_NAME}):
        raise VerifyMismatch(f"{artifact.path / name}: not in the manifest", hint)
    for name, expected in artifact.manifest["files"].items():
        path = artifact.path / name
        if path.is_symlink() or not path.is_file():
            raise VerifyMismatch(f"{path}: missing, the manifest lists it", hint)
        if (found := file_facts(path)) != expected:
            raise VerifyMismatch(
                f"{path}: {found['bytes']} bytes with sha256 {found['sha256'][:12]}, the manifest says "
                f"{expected['bytes']} and {expected['sha256'][:12]}",
                hint,
            )


def require_same_sources(artifacts: Iterable[Artifact], sources: Mapping[str, Any]) -> None:
    """Raise InputError unless the artifacts were made from these base files."""
    for artifact in artifacts:
        recorded = artifact.manifest["sources"]["base"]["files"]
        for name, facts in sources.items():
            if recorded.get(name) != facts:
                raise InputError(
                    f"{artifact.path}: made from another {name} than the base now holds",
                    "choose another --out, or remove the folder to build it again",
                )
