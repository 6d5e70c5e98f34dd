"""What a text is made of: conversations or pieces of running text, each with its place in the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Chat = tuple[Mapping[str, str], ...]
ROW_HINT = 'give {"messages": [{"role": ..., "content": ...}]}, {"text": ...}, or {"prompt": ..., "completion": ...}'


@dataclass(frozen=True)
class Entry:
    """A conversation or a piece of running text, and where it stands, as in `line 3` or `row 3`.

    `is_file` is said of running text whose lines are those of its file.
    """

    content: Chat | str
    place: str
    is_file: bool = False


def content_of(row: object) -> Chat | str | None:
    """What a line of JSON or a row of a table holds; None where it is none of the known shapes.

    A prompt and its completion are a user's turn and the answer to it.
    """
    if not isinstance(row, Mapping):
        return None
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if row.get("messages") is not None:
        return _chat(row["messages"])
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return _chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}])
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat([*prompt, *completion])
    return None


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
