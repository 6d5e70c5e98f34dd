"""What is decided for each decoder block, kept until the artifact is built, so that a killed run goes on where it was.

    OUT/DIGEST.calibrated/block-0007.safetensors  the parts of the block's layers as bytes; in the metadata, which run
                                                 they belong to and the facts of each layer

A file appears whole or not at all: it is written under another name, brought to the disk, and renamed.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.numpy
from safetensors import SafetensorError, safe_open

from qlora_export.errors import UsageError
from qlora_export.tensors.header import StoredTensor, read_header

if TYPE_CHECKING:
    from qlora_export.engine.calibration.round_layer import Parts

SUFFIX = ".calibrated"
NAME = re.compile(r"[0-9a-f]{16}" + re.escape(SUFFIX))


@dataclass(frozen=True)
class KeptBlock:
    """A block that was decided: where the bytes of each part are, and the facts of its layers by stored name."""

    parts: dict[str, StoredTensor]
    facts: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class BlockStore:
    """The blocks of one way to round a model, known by its digest; artifacts that differ beyond it share them."""

    out: Path
    digest: str

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self.out / f"{self.digest[:16]}{SUFFIX}"

    def require_free(self) -> None:
        """Raise UsageError where something else has the folder's name; it is made with the first block."""
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise UsageError(f"{self.folder}: exists and is no folder", "move it away, or choose another --out")

    def load(self, number: int) -> KeptBlock | None:
        """A block of the same run; None when it is not there, or of another run."""
        path = self._path(number)
        if path.is_symlink() or not path.is_file():
            return None
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
        except (SafetensorError, OSError):
            return None
        if metadata.get("digest") != self.digest:
            return None
        return KeptBlock(read_header(path), json.loads(metadata["facts"]))

    def save(self, number: int, parts: Parts, facts: dict[str, dict[str, Any]]) -> KeptBlock:
        """Keep a block."""
        path = self._path(number)
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        metadata = {"digest": self.digest, "facts": json.dumps(facts, sort_keys=True)}
        with unfinished.open("wb") as file:
            file.write(safetensors.numpy.save(dict(parts), metadata))
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
        # As they are read again, keys in the same order: they come into the manifest.
        return KeptBlock(read_header(path), json.loads(metadata["facts"]))

    def _path(self, number: int) -> Path:
        return self.folder / f"block-{number:04d}.safetensors"


def remove_blocks(folder: Path) -> None:
    """Remove what this kind of run leaves in a folder, and the folder if nothing else is in it."""
    for pattern in ("block-*.safetensors", "block-*.unfinished"):
        for path in folder.glob(pattern):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def folders_of_blocks(out: Path) -> list[Path]:
    """The folders of blocks in a run folder."""
    found = (path for path in out.glob(f"*{SUFFIX}") if NAME.fullmatch(path.name))
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())
