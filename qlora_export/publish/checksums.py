"""SHA256SUMS: what `sha256sum -c SHA256SUMS` checks, one line for each file, sorted by name.

    <64 lowercase hexadecimal digits><two spaces><name relative to the folder><newline>

A name is one that every tool reads alike: printable, without backslash (`sha256sum` escapes it), relative, and without
`.`, `..` or empty steps, so that no line points out of the folder.
"""

from __future__ import annotations

import re

from qlora_export.artifact import FileFacts
from qlora_export.errors import InputError, Refused

LINE = re.compile(r"(?P<sha256>[0-9a-f]{64})  (?P<name>.+)")


def checksums(files: FileFacts) -> bytes:
    """Content of SHA256SUMS; raises Refused for a name that does not fit on a line or leaves the folder."""
    for name in files:
        if (wrong := _wrong_with(name)) is not None:
            raise Refused(f"{name!r}: {wrong}, so it cannot stand in SHA256SUMS", "rename the file")
    return "".join(f"{facts['sha256']}  {name}\n" for name, facts in sorted(files.items())).encode()


def read_checksums(content: bytes) -> dict[str, str]:
    """sha256 of every file by its name; raises InputError naming the line that is not as `checksums` writes it."""
    hint = "was the file edited, or cut short? It is one that qlora-export publishes"
    try:
        *lines, rest = content.decode().split("\n")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"SHA256SUMS: line {number} is not UTF-8", hint) from None
    if rest or not lines:
        raise InputError(f"SHA256SUMS: line {len(lines) + 1} has no end", hint)
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        parts = LINE.fullmatch(line)
        if parts is None:
            raise InputError(f"SHA256SUMS: line {number} is no sha256 with a name: {line[:80]!r}", hint)
        name = parts["name"]
        if (wrong := _wrong_with(name)) is not None:
            raise InputError(f"SHA256SUMS: line {number}: {name!r}: {wrong}", hint)
        if name in found:
            raise InputError(f"SHA256SUMS: line {number}: {name!r} is there twice", hint)
        found[name] = parts["sha256"]
    return found


def _wrong_with(name: str) -> str | None:
    """Why a file cannot be listed by this name."""
    if not name.isprintable() or "\\" in name:
        return "has a backslash or a character that cannot be seen"
    if any(step in ("", ".", "..") for step in name.split("/")):
        return "is not a plain path below the folder"
    if name == "-":
        return "means standard input to sha256sum"
    return None
