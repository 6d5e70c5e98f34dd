"""A base checkpoint, opened by its headers: which tensors there are, where, and what config.json says.

`model.safetensors`, or shards named by `model.safetensors.index.json`. No weight is read, no pickle is ever opened and
no name may lead out of the folder (links of a Hub cache into its own `blobs` are followed).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora_export.errors import InputError, Refused
from qlora_export.sources.weight_parts import weights_of
from qlora_export.sources.weights import Weight
from qlora_export.tensors.dtypes import FLOATS
from qlora_export.tensors.header import StoredTensor, read_header
from qlora_export.tensors.layout import INDEX_NAME, SINGLE_NAME

# A Hub cache has snapshots/REVISION, at any depth of which files may be links to blobs.
SNAPSHOTS = "snapshots"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: folder, raw config.json, tensors in file and offset order, weight files."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    files: tuple[Path, ...]

    @cached_property
    def headers_sha256(self) -> str:
        """sha256 over the sorted names, shapes and dtypes: which base this is, whatever its sharding."""
        facts = sorted(
            [tensor.spec.name, list(tensor.spec.shape), tensor.spec.dtype] for tensor in self.tensors.values()
        )
        return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()

    @cached_property
    def weights(self) -> Mapping[str, Weight]:
        """The weights that the tensors make up, in their order; raises InputError where one is incomplete."""
        return weights_of(self.tensors, self.config)

    @property
    def dtype(self) -> str:
        """The floating dtype that holds most of the weights; BF16 when there is none."""
        values_by_dtype = Counter({"BF16": 0})
        for weight in self.weights.values():
            if weight.spec.dtype in FLOATS:
                values_by_dtype[weight.spec.dtype] += weight.spec.size
        return values_by_dtype.most_common(1)[0][0]

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of config.json that describes the language model: all of it but in multimodal wrappers."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def states_tying(self) -> bool | None:
        """What config.json says of tied embeddings; None where it leaves that to the model's default."""
        stated = self.config.get("tie_word_embeddings", self.text_config.get("tie_word_embeddings"))
        return None if stated is None else bool(stated)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder; raises InputError or Refused naming file, tensor and number."""
    require_folder(folder, "base")
    config = read_json(folder / "config.json")
    names = _weight_files(folder)
    tensors = read_tensors(folder, names)
    if (folder / INDEX_NAME).exists():
        require_indexed(folder / INDEX_NAME, tensors)
    checkpoint = Checkpoint(folder, config, tensors, tuple(folder / name for name in names))
    _ = checkpoint.weights
    return checkpoint


def read_tensors(folder: Path, names: Sequence[str]) -> dict[str, StoredTensor]:
    """The tensors of some weight files of a folder; raises InputError when two hold the same one."""
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        for tensor in read_header(contained_file(folder, name)).values():
            if tensor.spec.name in tensors:
                first = tensors[tensor.spec.name].path.name
                raise InputError(f"{folder}: tensor {tensor.spec.name} is in both {first} and {name}")
            tensors[tensor.spec.name] = tensor
    return tensors


def require_folder(folder: Path, role: str) -> None:
    """Raise InputError unless `folder` is a folder."""
    if not folder.is_dir():
        raise InputError(
            f"{role} {folder}: no such folder",
            "give a local folder; a model of the Hub is fetched first with `hf download`",
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises InputError when it is missing or something else."""
    if not os.path.lexists(path):
        raise InputError(f"{path}: missing", "is this the right folder?")
    require_contained(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})", "restore the file from where it came") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: a {type(data).__name__}, expected a JSON object")
    return data


def contained_file(folder: Path, name: str) -> Path:
    """A weight file of the folder; raises Refused when the name leads elsewhere, InputError when it is missing."""
    if not SHARD_NAME.fullmatch(name):
        raise Refused(f"{folder}: weight file {name!r} is no plain safetensors file name", "the index may be hostile")
    path = folder / name
    if not path.exists():
        raise InputError(f"{path}: the index names this shard, it is missing", "fetch the whole model again")
    return require_contained(path)


def require_contained(path: Path) -> Path:
    """The path itself; raises Refused for a link out of its folder, but for a Hub cache's own `blobs`.

    Raises InputError for what is no file: a folder, a pipe, a device.
    """
    target, folder = path.resolve(), path.parent.resolve()
    snapshots = [place for place in (folder, *folder.parents) if place.parent.name == SNAPSHOTS]
    inside = target.parent in (folder, *(place.parent.parent / "blobs" for place in snapshots))
    if not inside or not target.exists():
        raise Refused(f"{path}: leads out of the folder, to {target}", "copy the real file into the folder")
    if not target.is_file():
        what = "folder" if target.is_dir() else "pipe or a device"
        raise InputError(f"{path}: is a {what}, expected a file", "put the real file there")
    return path


def pickles(folder: Path, stem: str) -> list[str]:
    """Names of weight files in the folder that only pickle could open."""
    return sorted(path.name for path in folder.glob(f"{stem}*") if path.suffix in PICKLE_SUFFIXES)


def _weight_files(folder: Path) -> tuple[str, ...]:
    if (folder / INDEX_NAME).exists() and (folder / SINGLE_NAME).exists():
        raise InputError(
            f"{folder}: holds both {SINGLE_NAME} and {INDEX_NAME}", "remove the one that is stale: loaders do not agree"
        )
    if (folder / INDEX_NAME).exists():
        return tuple(sorted(set(weight_map(folder / INDEX_NAME).values())))
    if (folder / SINGLE_NAME).exists():
        return (SINGLE_NAME,)
    if found := pickles(folder, "pytorch_model") + pickles(folder, "model"):
        raise Refused(
            f"{folder}: its only weights are pickles ({', '.join(found[:3])})",
            "a pickle can run code; convert it to safetensors where you trust it",
        )
    raise InputError(f"{folder}: no {SINGLE_NAME} and no {INDEX_NAME}", "is this a model folder?")


def weight_map(path: Path) -> dict[str, str]:
    """File by tensor, from an index file; raises InputError or Refused when it is none or names other places."""
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise InputError(f"{path}: no weight_map", "restore the index from where the model came")
    for name, file in table.items():
        if not isinstance(file, str) or not SHARD_NAME.fullmatch(file):
            raise Refused(f"{path}: tensor {name} points to {file!r}", "a weight_map may only name files beside it")
    return table


def require_indexed(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise InputError unless an index names exactly these tensors, each in the file that holds it."""
    table = weight_map(path)
    for name, file in table.items():
        if name not in tensors or tensors[name].path.name != file:
            raise InputError(f"{path}: tensor {name} is not in {file}", "index and shards do not agree")
    if extra := next((name for name in tensors if name not in table), None):
        raise InputError(f"{path}: tensor {extra} of {tensors[extra].path.name} is not listed")
