"""What goes over the wire: a request that was read, an answer to be written, a refusal with the Hub's error headers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from io import BufferedIOBase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from qlora_export.testing.storage import read_chunks


@dataclass(frozen=True)
class Record:
    """One request as it was answered; `range` is its Range header, status 0 stands for a closed connection."""

    method: str
    path: str
    query: str
    range: str | None
    status: int


@dataclass(frozen=True)
class Caller:
    """Who asks: `role` is anonymous, read or write; a trusted publisher is bound to one `repository`."""

    role: str
    repository: str | None = None


class Body:
    """A request's body, read at most to its declared end."""

    def __init__(self, file: BufferedIOBase, size: int) -> None:
        self._file, self.size, self._left = file, size, size

    def chunks(self) -> Iterator[bytes]:
        """The rest in pieces; raises ConnectionError when the sender stops early."""
        for chunk in read_chunks(self._file, self._left):
            self._left -= len(chunk)
            yield chunk
        if self._left:
            raise ConnectionResetError(f"the body ends {self._left} bytes early")

    def lines(self) -> Iterator[bytes]:
        """The rest line by line."""
        while self._left:
            line = self._file.readline(self._left)
            if not line:
                raise ConnectionResetError(f"the body ends {self._left} bytes early")
            self._left -= len(line)
            yield line

    def drain(self) -> None:
        """Read what nobody asked for, so that the answer reaches a sender that is still writing."""
        for _ in self.chunks():
            pass


@dataclass(frozen=True)
class Request:
    """A request and the words its route captured from the path."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Message
    body: Body
    words: Mapping[str, str] = field(default_factory=dict)
    caller: Caller = Caller("anonymous")

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; raises Refusal when it is none."""
        content = b"".join(self.body.chunks())
        try:
            data = json.loads(content or b"{}")
        except ValueError:
            raise Refusal(400, "The body is no JSON") from None
        if not isinstance(data, dict):
            raise Refusal(400, "The body is no JSON object")
        return data

    def form(self) -> dict[str, list[str]]:
        """The body as a form (or as JSON, which newer clients may send)."""
        if "json" in self.headers.get("Content-Type", ""):
            return {name: value if isinstance(value, list) else [str(value)] for name, value in self.json().items()}
        return parse_qs(b"".join(self.body.chunks()).decode())


@dataclass(frozen=True)
class FileSpan:
    """`count` bytes of a file on disk."""

    path: Path
    start: int
    count: int


@dataclass(frozen=True)
class Answer:
    """A status, headers, and bytes or a part of a file."""

    status: int = 200
    content: bytes | FileSpan = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """The Hub says no: `code` goes into X-Error-Code, `data` into the body beside the message."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None, **data: Any
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.data = status, message, code, data
        self.headers = dict(headers or {})

    def answer(self) -> Answer:
        """The refusal as it is sent."""
        shown = " ".join(self.message.split()).encode("latin-1", "replace").decode("latin-1")
        headers = {"X-Error-Message": shown, **self.headers}
        if self.code:
            headers["X-Error-Code"] = self.code
        return json_answer({"error": self.message, **self.data}, self.status, headers)


class HangUp(Exception):
    """The connection is closed without an answer."""


def json_answer(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """Data as JSON."""
    content_type = {"Content-Type": "application/json; charset=utf-8"}
    return Answer(status, json.dumps(data, default=str).encode(), {**content_type, **(headers or {})})
