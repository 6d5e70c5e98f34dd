"""What a build has finished, so that a killed run goes on where it stopped.

`NAME.partial/.journal` holds one JSON object a line: first the digest of the plan, then the sha256 of each source file
and lists of tensors whose bytes had reached the disk before the line was written; a tensor is listed only once its
source is. A line may hold the mark of a run, by which workers on other machines know the folder: it says nothing of
what is finished. A torn last line is ignored. What is listed counts only while the sources still have these digests and
every weight file is there with its size and header; else everything is written again, with the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_export.errors import UsageError

JOURNAL_NAME = ".journal"
PLAN_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_ours(folder: Path) -> bool:
    """Whether a run of ours made this partial folder: it is a real folder whose journal begins with a plan's digest."""
    if folder.is_symlink() or not (folder / JOURNAL_NAME).is_file():
        return False
    with (folder / JOURNAL_NAME).open("rb") as file:
        try:
            first = json.loads(file.readline())
        except ValueError:
            return False
    plan = first.get("plan") if isinstance(first, dict) else None
    return isinstance(plan, str) and PLAN_DIGEST.fullmatch(plan) is not None


def marked(folder: Path, text: str) -> bool:
    """Whether a journal holds a mark."""
    path = folder / JOURNAL_NAME
    return path.is_file() and json.dumps({"mark": text}) in path.read_text(encoding="utf-8").splitlines()


class Journal:
    """The journal of one artifact's partial folder."""

    def __init__(self, folder: Path, plan_digest: str) -> None:
        self._path = folder / JOURNAL_NAME
        self._plan_digest = plan_digest
        self._appending = threading.Lock()
        self.sources: dict[str, str] = {}
        self.finished: set[str] = set()
        records = self._records()
        if not records:
            self.restart()
            return
        if records[0].get("plan") != plan_digest:
            raise UsageError(
                f"{folder}: left behind by a run of another plan",
                f"`qlora-export clean {folder.parent} --yes` removes it; or choose another --out",
            )
        for record in records[1:]:
            self.sources |= record.get("source", {})
            self.finished |= set(record.get("tensors", ()))

    def restart(self) -> None:
        """Forget everything but the plan."""
        self.sources, self.finished = {}, set()
        self._path.write_text(json.dumps({"plan": self._plan_digest}) + "\n", encoding="utf-8")

    def add_source(self, name: str, sha256: str) -> None:
        """Record the digest of a source file."""
        if self.sources.get(name) != sha256:
            self.sources[name] = sha256
            self._append({"source": {name: sha256}})

    def add(self, tensors: Sequence[str]) -> None:
        """Record tensors whose bytes are on the disk."""
        self.finished.update(tensors)
        self._append({"tensors": list(tensors)})

    def mark(self, text: str) -> None:
        """Leave a mark that `marked` finds."""
        self._append({"mark": text})

    def _append(self, record: dict[str, Any]) -> None:
        with self._appending, self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _records(self) -> list[dict[str, Any]]:
        """All whole lines; a torn tail is cut off so that the next line starts clean."""
        if not self._path.exists():
            return []
        whole = self._path.read_bytes().rpartition(b"\n")[0]
        try:
            records = [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            records = [None]
        if not all(isinstance(record, dict) for record in records):
            raise UsageError(f"{self._path}: no journal of ours", f"remove {self._path.parent} or choose another --out")
        self._path.write_bytes(whole + b"\n" if whole else b"")
        return records
