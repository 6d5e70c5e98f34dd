"""The manifest of a finished folder: every file with size and sha256, what it was made from, and by what.

`manifest.json` is written last and holds no time and no path of the machine, so the same plan gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numba
import numpy as np

from qlora_export import __version__
from qlora_export.contracts import TORCH_NAMES, Artifact
from qlora_export.errors import InputError, UsageError, VerifyMismatch
from qlora_export.planning import ArtifactPlan, Plan
from qlora_export.sources.locate import identity
from qlora_export.tensors.reading import BeforeWait, read_at

CHUNK_BYTES = 1 << 19
MANIFEST_NAME = "manifest.json"
FileFacts = dict[str, dict[str, Any]]


def file_facts(path: Path, before_wait: BeforeWait = lambda: None) -> dict[str, Any]:
    """Size and sha256 of a file, which is read once from its beginning."""
    digest, position, chunk = hashlib.sha256(), 0, memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := read_at(file.fileno(), chunk, position, before_wait):
            digest.update(chunk[:count])
            position += count
    return {"bytes": position, "sha256": digest.hexdigest()}


def make_manifest(plan: Plan, artifact: ArtifactPlan, sources: FileFacts, files: FileFacts) -> bytes:
    """Content of manifest.json; `sources` are the base's weight files, `files` the artifact's."""
    manifest = {
        "schema": 1,
        "name": artifact.name,
        "format": artifact.form.name,
        "runtime": "transformers",
        "plan_digest": artifact.digest,
        "recipe_digest": plan.recipe.digest,
        "versions": versions(),
        "onto": artifact.onto,
        "rounding": artifact.rounding.facts,
        **({"calibration": artifact.made.facts} if artifact.made.facts else {}),
        **origin(plan, sources),
        "files": files,
    }
    return manifest_bytes(manifest)


def versions() -> dict[str, str]:
    """What computes."""
    return {
        "qlora_export": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
    }


def origin(plan: Plan, base_files: FileFacts) -> dict[str, Any]:
    """What every manifest says of where its artifact comes from."""
    training = plan.live_training
    adapter = plan.adapter
    return {
        "training_quantization": {
            "provenance": training.provenance,
            "quant_type": training.quant_type,
            "block_size": training.block_size,
            "double_quant": training.double_quant,
            "storage_dtype": TORCH_NAMES[training.storage_dtype],
            "compute_dtype": TORCH_NAMES[training.compute_dtype],
        }
        if adapter
        else None,
        "assumptions": list(plan.assumptions),
        "sources": {
            "base": {
                "id": plan.recipe.base_id or identity(plan.checkpoint.folder),
                "headers_sha256": plan.checkpoint.headers_sha256,
                "files": base_files,
            },
            "adapter": {"id": identity(adapter.folder), "sha256": adapter.sha256} if adapter else None,
            "combined_from": [
                {"id": identity(item.adapter.folder), "sha256": item.adapter.sha256, "weight": item.weight}
                for item in plan.opened.combined
            ],
        },
    }


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as it is written."""
    return json.dumps(manifest, indent=2).encode() + b"\n"


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
