"""What a build has finished, so that a killed run goes on where it stopped.

`NAME.partial/.journal` holds one JSON object a line: first the digest of the plan, then lists of tensors whose bytes
had reached the disk before the line was written. A torn last line is ignored: its tensors are written again, with the
same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_export.errors import UsageError

JOURNAL_NAME = ".journal"


class Journal:
    """The journal of one artifact's partial folder."""

    def __init__(self, folder: Path, plan_digest: str) -> None:
        self._path = folder / JOURNAL_NAME
        records = _records(self._path)
        if records and records[0].get("plan") != plan_digest:
            raise UsageError(
                f"{folder}: left behind by a run of another plan", f"remove {folder} or choose another --out"
            )
        self.finished: set[str] = {name for record in records[1:] for name in record.get("tensors", ())}
        if not records:
            self._path.write_text("")
            self._append({"plan": plan_digest})

    def add(self, tensors: Sequence[str]) -> None:
        """Record tensors whose bytes are on the disk."""
        self.finished.update(tensors)
        self._append({"tensors": list(tensors)})

    def _append(self, record: dict[str, object]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _records(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a torn tail is cut off so that the next line starts clean."""
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    path.write_bytes(whole + b"\n" if whole else b"")
    return [json.loads(line) for line in whole.splitlines()]
