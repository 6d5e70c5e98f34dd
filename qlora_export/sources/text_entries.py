"""What a text is made of: conversations or pieces of running text, each with its place in the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Chat = tuple[Mapping[str, str], ...]
ROW_HINT = 'give {"messages": [{"role": ..., "content": ...}]}, {"text": ...}, or {"prompt": ..., "completion": ...}'


@dataclass(frozen=True)
class Entry:
    """A conversation or a piece of running text, and where it stands, as in `line 3` or `row 3`.

    `is_file` is said of running text whose lines are those of its file. The first `prompt_messages` of a conversation
    only lead to the others: whatever learns from it or is measured on it is not asked for them. What a classifier
    should say of running text is its `label`, a number or a name; `pair` is the second text that it reads beside it.
    """

    content: Chat | str
    place: str
    is_file: bool = False
    prompt_messages: int = 0
    label: int | str | None = None
    pair: str | None = None

    @property
    def chat(self) -> Chat:
        """The conversation; no message for running text."""
        return () if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """The running text; empty for a conversation."""
        return self.content if isinstance(self.content, str) else ""


def entry_of(row: object, place: str) -> Entry | None:
    """What a line of JSON or a row of a table holds; None where it is none of the known shapes.

    A prompt and its completion are a user's turn and the answer to it, or conversations that follow each other.
    """
    if not isinstance(row, Mapping):
        return None
    if isinstance(row.get("text"), str):
        return _text_entry(row, place)
    if row.get("messages") is not None:
        return _chat_entry(row["messages"], place)
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _chat_entry(turns, place, prompt_messages=1)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat_entry([*prompt, *completion], place, len(prompt))
    return None


def _text_entry(row: Mapping[str, object], place: str) -> Entry:
    label, pair = row.get("label"), row.get("text_pair")
    known = isinstance(label, int | str) and not isinstance(label, bool)
    return Entry(
        str(row["text"]),
        place,
        label=label if known else None,  # type: ignore[arg-type]
        pair=pair if isinstance(pair, str) else None,
    )


def _chat_entry(messages: object, place: str, prompt_messages: int = 0) -> Entry | None:
    chat = _chat(messages)
    return None if chat is None else Entry(chat, place, prompt_messages=prompt_messages)


def _chat(messages: object) -> Chat | None:
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        return None
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def _is_message(message: object) -> bool:
    return (
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )
