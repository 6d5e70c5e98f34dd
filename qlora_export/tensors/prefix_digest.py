"""sha256 of a file that is written in any order, taken while it fills: never more than one part behind the writers.

Ranges are marked as they are written; whatever follows the hashed prefix without a gap can be hashed, from the page
cache, by whoever has time. The file is opened for every step, which is when NFS looks for what other machines wrote.
Cost: one read of the file and about 0.6 ns a byte.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import threading
from pathlib import Path

CHUNK_BYTES = 1 << 20


class PrefixDigest:
    """The digest of a file of `size` bytes."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self.size = size
        self._digest = hashlib.sha256()
        self._hashed = 0
        self._filled = 0
        self._ahead: list[tuple[int, int]] = []
        self._marking = threading.Lock()
        self._hashing = threading.Lock()

    def mark(self, first: int, count: int) -> None:
        """Take note that `count` bytes from `first` on are written and stay as they are."""
        with self._marking:
            heapq.heappush(self._ahead, (first, first + count))
            while self._ahead and self._ahead[0][0] <= self._filled:
                self._filled = max(self._filled, heapq.heappop(self._ahead)[1])

    def advance(self, least: int = 1) -> None:
        """Hash what can be hashed, if that is `least` bytes or more and nobody else is at it."""
        if self._filled - self._hashed < least or not self._hashing.acquire(blocking=False):
            return
        try:
            self._hash_to(self._filled)
        finally:
            self._hashing.release()

    def drop(self) -> None:
        """Leave nothing of what was hashed in the page cache, but for what is not on the disk yet."""
        with self._path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, self._hashed, os.POSIX_FADV_DONTNEED)

    def sha256(self) -> str:
        """The digest of the whole file, all of which has been marked; raises ValueError otherwise."""
        with self._hashing:
            if self._filled != self.size:
                raise ValueError(f"{self._filled} of {self.size} bytes are written")
            self._hash_to(self.size)
            return self._digest.hexdigest()

    def _hash_to(self, stop: int) -> None:
        with self._path.open("rb", buffering=0) as file:
            while self._hashed < stop:
                data = os.pread(file.fileno(), min(CHUNK_BYTES, stop - self._hashed), self._hashed)
                if not data:
                    raise ValueError(f"the file ends at byte {self._hashed} of {self.size}")
                self._digest.update(data)
                self._hashed += len(data)
