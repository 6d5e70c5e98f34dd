"""Positioned writes into the planned files: header first, then parts at their offsets, in any order, from any thread.

Every file gets its full size before the first write, so a disk that is too small is found at once. Parts that are whole
are hashed behind the writers, as far as the file is filled from its beginning.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from qlora_export.errors import EnvironmentProblem, InputError
from qlora_export.quant.floats import Float32
from qlora_export.tensors.layout import Layout, ShardLayout, lay_out
from qlora_export.tensors.prefix_digest import PrefixDigest
from qlora_export.types import Part, Piece


class ShardWriter:
    """Writes the weight files of one artifact into a folder.

    One that `joins` finds them made by another process, perhaps on another machine, and only adds pieces to them.
    """

    def __init__(self, folder: Path, layout: Layout, joins: bool = False) -> None:
        self._places = layout.places
        self._descriptors: dict[str, int] = {}
        self._digests: dict[str, PrefixDigest] = {}
        try:
            for shard in layout.shards:
                path = folder / shard.file
                self._descriptors[shard.file] = _join(path, shard) if joins else _create(path, shard)
                self._digests[shard.file] = PrefixDigest(path, shard.bytes)
                self._digests[shard.file].mark(0, len(shard.header))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, piece: Piece) -> None:
        """Write a piece of a part at its place."""
        place = self._places[piece.part]
        if piece.offset + piece.data.nbytes > place.bytes:
            raise ValueError(f"{piece.part}: {piece.data.nbytes} bytes at {piece.offset} pass its {place.bytes} bytes")
        write_at(self._descriptors[place.file], piece.data.data, place.offset + piece.offset)

    def done(self, parts: Iterable[str]) -> None:
        """These parts are whole, and stay as they are."""
        for name in parts:
            place = self._places[name]
            self._digests[place.file].mark(place.offset, place.bytes)

    def hash_behind(self, least_bytes: int = 1) -> None:
        """Hash what is whole from the beginning of each file, where that is `least_bytes` or more."""
        for digest in self._digests.values():
            digest.advance(least_bytes)

    def drop(self) -> None:
        """Leave nothing in the page cache of what is hashed and synced."""
        for digest in self._digests.values():
            digest.drop()

    def facts(self) -> dict[str, dict[str, Any]]:
        """Size and sha256 of every file by name; all parts must be done."""
        return {file: {"bytes": digest.size, "sha256": digest.sha256()} for file, digest in self._digests.items()}

    def sync(self) -> None:
        """Bring everything written so far to the disk."""
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)

    def close(self) -> None:
        """Close all files; what was written stays."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def write_tensors(path: Path, tensors: Mapping[str, Float32]) -> None:
    """Write float32 arrays as one small safetensors file, sorted by name, and bring it to the disk."""
    parts = [[Part(name, "F32", tensor.shape)] for name, tensor in sorted(tensors.items())]
    layout = lay_out(parts, sys.maxsize, path.name)
    with ShardWriter(path.parent, layout) as writer:
        for name, tensor in tensors.items():
            writer.write(Piece(name, 0, np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)))
        writer.sync()


def disk_full(path: Path, needed_bytes: int) -> EnvironmentProblem:
    """The error for a disk without room."""
    return EnvironmentProblem(
        f"{path}: no space for {needed_bytes} bytes", "free some disk space or choose another --out, then run again"
    )


def _create(path: Path, shard: ShardLayout) -> int:
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        _reserve(descriptor, path, shard.bytes)
        write_at(descriptor, memoryview(shard.header), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _join(path: Path, shard: ShardLayout) -> int:
    """Open for writing alone: a client of NFS that read pages, too, might write them back whole, over a neighbour."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    if (size := os.fstat(descriptor).st_size) != shard.bytes:
        os.close(descriptor)
        raise InputError(f"{path}: {size} bytes, the plan says {shard.bytes}", "run again, with nobody else in --out")
    return descriptor


def _reserve(descriptor: int, path: Path, size: int) -> None:
    try:
        os.ftruncate(descriptor, size)
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise disk_full(path, size) from None
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def write_at(descriptor: int, view: memoryview, position: int) -> None:
    """Write all bytes of a view at a position of a file."""
    view = view.cast("B")
    while view:
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count
