"""Text to measure on or to calibrate on: one kind in a file, chats or running text.

train.jsonl      a line is {"messages": [...]}, {"text": ...} or {"prompt": ..., "completion": ...}; for a classifier
                 {"text": ..., "label": ...}
notes.txt        anything else that is UTF-8 is one piece of running text
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qlora_export.errors import InputError
from qlora_export.sources.json_lines import value_of_line
from qlora_export.sources.text_entries import ROW_HINT, Chat, Entry, entry_of
from qlora_export.sources.text_tables import HUB_PREFIX, PARQUET_SUFFIX, hub_entries, parquet_entries


@dataclass(frozen=True)
class DriftText:
    """Chats, or pieces of running text; never both. `origin` is where they were read, for what is said of them."""

    entries: tuple[Entry, ...] = ()
    origin: str = "the text for drift"

    @property
    def chats(self) -> tuple[Chat, ...]:
        """The conversations; none where the text is running text."""
        return tuple(entry.content for entry in self.entries if not isinstance(entry.content, str))

    @property
    def text(self) -> str:
        """The pieces with an empty line between them; empty where the text is conversations."""
        return "\n\n".join(entry.content for entry in self.entries if isinstance(entry.content, str))


def read_text(name: str | Path, folder: Path = Path()) -> DriftText:
    """Read a text for drift, its pieces of running text joined; raises InputError naming the line."""
    origin = str(name) if str(name).startswith(HUB_PREFIX) else str(folder / Path(name).expanduser())
    return DriftText(read_entries(str(name), folder), origin)


def joined(entries: tuple[Entry, ...]) -> DriftText:
    """Entries as chats, or as running text with an empty line between the pieces."""
    return DriftText(entries)


def read_entries(name: str, folder: Path) -> tuple[Entry, ...]:
    """The chats or the pieces of running text of a file, seen from `folder`, or of a data set on the Hub.

    Raises InputError naming the line or the row.
    """
    if name.startswith(HUB_PREFIX):
        entries, origin = hub_entries(name), name
    else:
        path = folder / Path(name).expanduser()
        if not path.is_file():
            raise InputError(
                f"{path}: no such text", "name a .jsonl, .parquet or .txt file, or hub:owner/name@COMMIT#train"
            )
        entries, origin = parquet_entries(path) if path.suffix == PARQUET_SUFFIX else _lines(path), str(path)
    chats = sum(not isinstance(entry.content, str) for entry in entries)
    if 0 < chats < len(entries):
        raise InputError(f"{origin}: {chats} chats and {len(entries) - chats} plain texts", "use one kind in a file")
    return entries


def _lines(path: Path) -> tuple[Entry, ...]:
    try:
        raw = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})", "save it as UTF-8") from None
    if path.suffix != ".jsonl":
        return (Entry(raw, "line 1", is_file=True),)
    return tuple(_entry(path, number, line) for number, line in enumerate(raw.split("\n"), 1) if line.strip())


def _entry(path: Path, number: int, line: str) -> Entry:
    entry = entry_of(value_of_line(line, f"{path}: line {number}", ROW_HINT), f"line {number}")
    if entry is None:
        raise InputError(f"{path}: line {number} has neither messages nor text", ROW_HINT)
    return entry
