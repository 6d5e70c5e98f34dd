"""Digests of the base's weight files, taken by jobs of the pool while the files are in the page cache."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qlora_export.artifact import file_facts
from qlora_export.engine.tensor_job import RowBlock
from qlora_export.tensors.reading import BeforeWait


class SourceDigests:
    """Size and sha256 of every source file that was hashed so far."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.before_wait: BeforeWait = lambda: None
        self.facts: dict[str, dict[str, Any]] = {}

    def hash_file(self, path: Path) -> None:
        """Hash a file unless that was done."""
        if path.name not in self.facts:
            self.facts[path.name] = file_facts(path, self.before_wait)

    def hash_all(self, names: Sequence[str], workers: int) -> None:
        """Hash the named files."""
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(self.hash_file, [path for path in self.paths if path.name in names]))

    def sorted(self) -> dict[str, dict[str, Any]]:
        """The facts by name."""
        return dict(sorted(self.facts.items()))


class HashJob:
    """Hashing one file, as the pool knows jobs: a single block and no first pass."""

    blocks = (RowBlock(0, 1),)
    observes = False

    def __init__(self, digests: SourceDigests, path: Path) -> None:
        self._digests = digests
        self._path = path

    def observe(self, block: RowBlock) -> None:
        """There is no first pass."""

    def settle(self) -> None:
        """There is no first pass."""

    def encode(self, block: RowBlock) -> None:
        """Hash the file."""
        self._digests.hash_file(self._path)

    def seal(self) -> None:
        """The digest is already noted."""
