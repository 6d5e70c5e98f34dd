"""A staged release that a test may break, and what the lint says of it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_export.artifact import MANIFEST_NAME, Artifact, file_facts, read_artifact
from qlora_export.engine.manifest import manifest_bytes
from qlora_export.errors import ExitCode
from qlora_export.publish.lint import RULES, lint
from qlora_export.publish.staged_folder import Staged

FORMATS: tuple[str, ...] = ("bf16", "nf4", "nf4-adapter", "int8", "w4a16", "w8a8", "fp8", "fp8-block", "gptq", "awq")
FORMATS += ("nvfp4a16", "mxfp4a16", "nf4-lowrank", "adapter", "onnx-int4")
EMBEDDING = "model.embed_tokens.weight"
LINEAR = "model.layers.0.mlp.up_proj.weight"


def listed(folder: Path, *prefixes: str) -> Staged:
    """Everything in the folder on the list, and what changed in the manifests too."""
    artifacts: dict[str, Artifact] = {}
    for prefix in prefixes:
        artifact = read_artifact(folder / prefix)
        names = [name for name in artifact.manifest["files"] if (folder / prefix / name).is_file()]
        manifest = {**artifact.manifest, "files": {name: file_facts(folder / prefix / name) for name in names}}
        (folder / prefix / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
        artifacts[prefix] = read_artifact(folder / prefix)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return Staged(folder, {path.relative_to(folder).as_posix(): file_facts(path) for path in paths}, artifacts)


def again(staged: Staged) -> Staged:
    """The same after its files were changed."""
    return listed(staged.folder, *staged.artifacts)


def found(staged: Staged, stated: str | None = "apache-2.0", base: str | None = None) -> list[str]:
    """The messages of a lint, each with a hint, exit 4 and a known rule."""
    problems = lint(staged, stated, base)
    for problem in problems:
        assert problem.exit_code == ExitCode.REFUSED
        assert problem.hint
        assert problem.message.rpartition("[")[2].rstrip("]") in RULES
        assert str(staged.folder) not in problem.message
    return [problem.message for problem in problems]


def edit_manifest(staged: Staged, change: Callable[[dict[str, Any]], None]) -> Staged:
    path = staged.folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_bytes(manifest_bytes(manifest))
    return again(staged)


def raw_header(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header: dict[str, Any] = json.loads(raw[8 : 8 + size])
    return header


def write_raw(path: Path, header: dict[str, Any], data: bytes) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def split(folder: Path, count: int = 2) -> dict[str, str]:
    """model.safetensors as shards with an index; where each tensor went."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    homes: dict[str, str] = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names[number::count]}
        save_file(part, folder / file, metadata={"format": "pt"})
        homes |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_index(folder, homes, total)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    del manifest["files"]["model.safetensors"]
    manifest["files"] |= {name: {} for name in {*homes.values(), "model.safetensors.index.json"}}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return homes


def write_index(folder: Path, homes: dict[str, str], total: int) -> None:
    table = {"metadata": {"total_size": total}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
