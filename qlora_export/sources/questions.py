"""Questions with answers to choose from, a line of JSON each.

{"question": "The capital of France is", "choices": ["Paris", "Rome"], "answer": 0}      or "answer": "Paris"
{"messages": [{"role": "user", "content": "..."}], "choices": [...], "answer": ...}      "prompt" is "question", too
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_export.errors import InputError
from qlora_export.sources.json_lines import value_of_line
from qlora_export.sources.text_entries import Chat, entry_of

HINT = 'a line is {"question": text, "choices": [text, text], "answer": number from 0 or text}, or with "messages"'


@dataclass(frozen=True)
class Question:
    """A piece of running text or a conversation, what may follow it, the number of the right choice, and its place."""

    place: str
    content: Chat | str
    choices: tuple[str, ...]
    answer: int

    @property
    def text(self) -> str:
        """What is asked, for people."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(message["content"] for message in self.content)


def read_questions(path: Path) -> tuple[Question, ...]:
    """The questions of a file; raises InputError naming file and line."""
    if not path.is_file():
        raise InputError(f"{path}: no such file of questions", HINT)
    try:
        raw = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})", HINT) from None
    found = [_question(path, number, line) for number, line in enumerate(raw.split("\n"), 1) if line.strip()]
    if not found:
        raise InputError(f"{path}: holds no question", HINT)
    return tuple(found)


def _question(path: Path, number: int, line: str) -> Question:
    place = f"line {number}"
    row = value_of_line(line, f"{path}: {place}", HINT)
    content, choices = _content(row, place), row.get("choices") if isinstance(row, dict) else None
    if content is None:
        raise InputError(f"{path}: {place} has no question", HINT)
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise InputError(f"{path}: {place}: choices is no list of texts", HINT)
    if len(set(choices)) < max(2, len(choices)):
        raise InputError(f"{path}: {place} has {len(choices)} choices, {len(set(choices))} of them different", HINT)
    answer = _answer(row.get("answer"), choices)
    if answer is None:
        raise InputError(f"{path}: {place}: the answer {row.get('answer')!r} is not among its choices", HINT)
    return Question(place, content, tuple(choices), answer)


def _content(row: Any, place: str) -> Chat | str | None:
    if not isinstance(row, Mapping):
        return None
    if row.get("messages") is not None:
        entry = entry_of({"messages": row["messages"]}, place)
        return entry.content if entry else None
    text = row.get("question", row.get("prompt"))
    return text if isinstance(text, str) and text.strip() else None


def _answer(answer: Any, choices: list[str]) -> int | None:
    """The number of the right choice; a number is one, a text is that of a choice."""
    if isinstance(answer, str):
        return choices.index(answer) if answer in choices else None
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    return None
