"""What a publication has sent so far: one JSON object a line, each on the disk before the next step begins.

It is evidence for people and for progress; the truth about a publication is the Hub's own tree listing. A last line
that was torn by a kill is dropped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class PublicationJournal:
    """The journal of one repository's publication, in a file that is made if need be."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        self.events = [json.loads(line) for line in whole]
        if len(whole) < len(lines):
            os.truncate(path, sum(map(len, whole)))

    def note(self, **event: Any) -> None:
        """Write an event down; raises OSError when the disk does not take it."""
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        try:
            os.write(descriptor, json.dumps(event).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.events.append(event)
