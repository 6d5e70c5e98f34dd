"""Where an artifact comes from, and what of an adapter it holds.

A base is pinned by the digests of its files or by a commit of the Hub, so that another base of the same name can be
told. Adapter tensors belong in the folder of a format that keeps its adapter (`nf4-adapter`) or ships a correction as
one (`nf4-lowrank`), or in an artifact that is an adapter; anywhere else they are what a merge forgot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from qlora_export.artifact import MANIFEST_NAME, Artifact
from qlora_export.catalog import ARTIFACTS
from qlora_export.errors import Problem
from qlora_export.merge.companion_files import ADAPTER_FOLDER
from qlora_export.publish.lint.contents import Contents, base_of, directory_of
from qlora_export.publish.lint.rules import finding
from qlora_export.publish.lint.weights import WeightFolder
from qlora_export.publish.staged_folder import Staged
from qlora_export.sources.adapter import CONFIG_NAME, SHARD_INDEX_NAME, WEIGHTS_NAME

DIGEST = re.compile(r"[0-9a-f]{64}")
PINNED_ID = re.compile(r".+@[0-9a-f]{40}")
ADAPTER_TENSOR = re.compile(
    r"(^|\.)(lora_[A-Za-z_]+|base_layer|modules_to_save|original_module|token_adapter|trainable_tokens_[a-z]+)(\.|$)"
    r"|^base_model\.model\."
)
PIN = "build again from a base with a commit, owner/name@COMMIT, or from a folder"


def keeps_adapter(artifact: Artifact) -> bool:
    """Whether the artifact's format ships an adapter in a folder beside the weights."""
    return artifact.format in ARTIFACTS and ARTIFACTS[artifact.format].beside is not None


def is_adapter(artifact: Artifact) -> bool:
    """Whether the artifact is an adapter alone."""
    return artifact.format in ARTIFACTS and ARTIFACTS[artifact.format].base_model_relation == "adapter"


def adapter_folders(staged: Staged) -> dict[str, str]:
    """The directories where adapters belong, each with what its base must be called: `..`, or anything."""
    folders = {}
    for prefix, artifact in staged.artifacts.items():
        if keeps_adapter(artifact):
            folders[f"{prefix}{ADAPTER_FOLDER}/"] = ".."
        elif is_adapter(artifact):
            folders[prefix] = ""
    return folders


def pin_problems(prefix: str, artifact: Artifact) -> Iterator[Problem]:
    """Where the manifest does not say by digest what the artifact was made from."""
    path = prefix + MANIFEST_NAME
    sources = _table(artifact.manifest.get("sources"))
    base, adapter = _table(sources.get("base")), sources.get("adapter")
    files = _table(base.get("files"))
    digests = _is_digest(base.get("headers_sha256")) and all(
        _is_digest(_table(facts).get("sha256")) for facts in files.values()
    )
    # An adapter alone holds nothing of the base: it is enough to know its shapes.
    pinned = digests and (bool(files) or is_adapter(artifact))
    if not pinned and not PINNED_ID.fullmatch(str(base.get("id"))):
        what = f"the base {base.get('id')} is known by no digest of its files and by no commit"
        yield finding("unpinned-base", path, what, PIN)
    if adapter is not None and not _is_digest(_table(adapter).get("sha256")):
        what = f"the adapter {_table(adapter).get('id')} has no sha256"
        yield finding("unpinned-base", path, what, "build again; the manifest was changed")


def adapter_problems(contents: Contents, staged: Staged, folders: list[WeightFolder]) -> Iterator[Problem]:
    """Adapter tensors and files that lie where no adapter belongs, and kept adapters that are incomplete."""
    allowed = adapter_folders(staged)
    for folder in folders:
        if folder.directory not in allowed:
            yield from _left_behind(folder)
    for name in sorted(contents.names):
        own = base_of(name) == CONFIG_NAME or base_of(name).startswith("adapter_model")
        if own and directory_of(name) not in allowed:
            what = "belongs to an adapter, and no artifact keeps one here"
            yield finding("adapter-left", name, what, "publish a format that keeps its adapter, or leave it out")
    for directory, base in allowed.items():
        yield from _kept(contents, directory, base)


def _left_behind(folder: WeightFolder) -> Iterator[Problem]:
    for name, tensors in folder.files.items():
        found = [tensor for tensor in tensors if ADAPTER_TENSOR.search(tensor)]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            what = f"{found[0]}{more} belong to an adapter that was not merged"
            yield finding("adapter-left", name, what, "merge again; these tensors are ignored by every loader")


def _kept(contents: Contents, directory: str, base: str) -> Iterator[Problem]:
    """The adapter of a directory: its two files, and a base that users can reach."""
    path = directory + CONFIG_NAME
    missing = [path] if path not in contents.names else []
    if not contents.names & {directory + WEIGHTS_NAME, directory + SHARD_INDEX_NAME}:
        missing.append(directory + WEIGHTS_NAME)
    for name in missing:
        yield finding("adapter-left", name, "is missing, the artifact keeps its adapter here", "build it again")
    named = (contents.table(path) or {}).get("base_model_name_or_path")
    if base and not missing and named != base:
        what = f"its base is {named!r}, expected {base!r}: the folder above"
        yield finding("base-path", path, what, "build the artifact again")
    elif isinstance(named, str) and _is_of_a_machine(named):
        what = "base_model_name_or_path is a path of the machine it was trained on"
        yield finding(
            "base-path", path, what, "write the base's Hub id into the adapter's adapter_config.json, build again"
        )


def _is_of_a_machine(path: str) -> bool:
    return PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute() or path.startswith("~")


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and bool(DIGEST.fullmatch(value))


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
