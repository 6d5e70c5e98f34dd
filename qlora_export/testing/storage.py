"""File contents on disk: small ones by their git blob id, large ones by sha256, uploads under way beside them.

    root/regular/<git sha1>    content that came inside a commit
    root/large/<sha256>        content that came through large file storage
    root/incoming/<ticket>     an upload that is not finished

Files of a folder that is only served are hashed and pointed at, not copied. Memory does not grow with a file's size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileEntry:
    """One file of a commit: `oid` is the git sha1 (of the pointer, for a large file), `sha256` only large ones have."""

    size: int
    oid: str
    sha256: str | None = None

    @property
    def etag(self) -> str:
        """What identifies the content in a download."""
        return self.sha256 or self.oid

    @property
    def pointer_bytes(self) -> int:
        """Size of the pointer that stands in git for a large file."""
        return len(_pointer(self.size, self.sha256 or ""))


class BlobStore:
    """Contents under one folder, found by hash; a trusting one takes a commit's word for large files it never saw."""

    def __init__(self, root: Path, trusting: bool = False) -> None:
        self._root, self._trusting = root, trusting
        self._paths: dict[str, Path] = {}
        self._sizes: dict[str, int] = {}
        self._stand_ins: dict[str, str] = {}
        for name in ("regular", "large", "incoming"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def incoming(self, ticket: str) -> Path:
        """Where an upload is collected."""
        return self._root / "incoming" / ticket

    def keep(self, content: bytes) -> FileEntry:
        """Store a small file."""
        entry = FileEntry(len(content), _blob_oid(content))
        path = self._root / "regular" / entry.oid
        path.write_bytes(content)
        self._paths[entry.oid] = path
        return entry

    def refer(self, path: Path) -> FileEntry:
        """A large file that stays where it is."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._paths[digest], self._sizes[digest] = path, path.stat().st_size
        return large_entry(self._sizes[digest], digest)

    def adopt(self, path: Path, digest: str) -> None:
        """Take over a finished upload whose content has this sha256."""
        target = self._root / "large" / digest
        self._sizes[digest] = path.stat().st_size
        path.replace(target)
        self._paths[digest] = target
        self._stand_ins.pop(digest, None)

    def stand_in(self, claimed: str, digest: str) -> None:
        """Let other content pass for a sha256 that was claimed."""
        self._stand_ins[claimed] = digest

    def holds(self, digest: str) -> bool:
        """Whether the content of a sha256 is here."""
        return digest in self._sizes

    def large(self, claimed: str, size: int) -> FileEntry | None:
        """The large file that stands for a sha256, with the size and sha256 of what is really stored."""
        digest = self._stand_ins.get(claimed, claimed)
        if self._trusting and digest not in self._sizes:
            return large_entry(size, digest)
        return large_entry(self._sizes[digest], digest) if digest in self._sizes else None

    def path(self, entry: FileEntry) -> Path:
        """The content of an entry."""
        return self._paths[entry.etag]


def large_entry(size: int, digest: str) -> FileEntry:
    """The entry of a large file."""
    return FileEntry(size, _blob_oid(_pointer(size, digest)), digest)


def read_chunks(file: BinaryIO | BufferedIOBase, count: int) -> Iterator[bytes]:
    """`count` bytes in pieces; fewer when the file ends early."""
    while count and (chunk := file.read(min(count, CHUNK_BYTES))):
        count -= len(chunk)
        yield chunk


def _pointer(size: int, digest: str) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()


def _blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
