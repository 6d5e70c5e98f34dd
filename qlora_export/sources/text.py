"""Text to measure on: JSON lines with `messages` (a chat) or `text` in each, or a plain text file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_export.errors import InputError

Chat = tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class DriftText:
    """Chats, or running text; never both."""

    chats: tuple[Chat, ...] = ()
    text: str = ""


def read_text(path: Path) -> DriftText:
    """Read a text file for drift; raises InputError naming the line."""
    if not path.is_file():
        raise InputError(f"{path}: no such text", "drift.text names a .jsonl or .txt file")
    try:
        raw = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if path.suffix != ".jsonl":
        return DriftText(text=raw)
    entries = [_entry(path, number, line) for number, line in enumerate(raw.split("\n"), 1) if line.strip()]
    chats = tuple(entry for entry in entries if not isinstance(entry, str))
    texts = [entry for entry in entries if isinstance(entry, str)]
    if chats and texts:
        raise InputError(f"{path}: {len(chats)} chats and {len(texts)} plain texts", "use one kind in a file")
    return DriftText(chats, "\n\n".join(texts))


def _entry(path: Path, number: int, line: str) -> Chat | str:
    hint = 'a line is {"messages": [{"role": ..., "content": ...}]} or {"text": ...}'
    try:
        data = json.loads(line)
    except ValueError:
        raise InputError(f"{path}: line {number} is not valid JSON", hint) from None
    if isinstance(data, dict) and isinstance(data.get("text"), str):
        return str(data["text"])
    messages = data.get("messages") if isinstance(data, dict) else None
    if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
        return tuple({"role": message["role"], "content": message["content"]} for message in messages)
    raise InputError(f"{path}: line {number} has neither messages nor text", hint)


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )
