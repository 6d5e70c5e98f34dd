r"""The YAML between the two `---` lines of a README, edited in place by the text of its top-level keys.

    BOM? blank*  ---\n  metadata  \n---\n  prose

The Hub's own pattern says what is front matter, so a `---` further down is prose. A key whose value is already the
wanted one keeps its text, comments and all; a list that only grows gets lines at its end; any other value replaces the
lines from its key to its last character; new keys follow the last one. Everything else stays byte for byte, and the
result is read back before it is handed out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from qlora_export.errors import InputError

README = "README.md"
FRONT_MATTER = re.compile(r"(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$))")
EMPTY_FRONT_MATTER = re.compile(r"(\s*---(?:\r\n|\n))()(---[ \t]*(?:\r\n|\n|$))")
LINE_BREAK = re.compile(r"\r\n|[\r\n\x85\u2028\u2029]")
FIRST_ITEM = re.compile(r"[\r\n]( *)- ")
MARK = "\ufeff"
HINT = "correct the YAML between the two --- lines of README.md, then run again"


@dataclass(frozen=True)
class Readme:
    """A README in its parts, which make it up again when they are put together; `newline` is how its lines end."""

    opening: str
    metadata: str
    closing: str
    prose: str
    newline: str = "\n"

    @property
    def text(self) -> str:
        """The whole file."""
        return f"{self.opening}{self.metadata}{self.closing}{self.prose}"

    @property
    def first_line(self) -> int:
        """The line of the file on which the metadata starts."""
        return self.opening.count("\n") + 1


@dataclass(frozen=True)
class Key:
    """A top-level key: its line, and the text from the start of that line to the end of its value's last line."""

    name: str | None
    line: int
    start: int
    end: int
    indent: str


class TextLoader(yaml.SafeLoader):
    """Safe YAML in which a date stays the text that it is."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _PlainDumper(yaml.SafeDumper):
    """YAML without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value out."""
        return True


def split_readme(text: str) -> Readme:
    """A README as front matter and prose; where it has no front matter, those parts are empty."""
    mark = MARK if text.startswith(MARK) else ""
    rest = text.removeprefix(MARK)
    newline = "\r\n" if rest[: rest.find("\n") + 1].endswith("\r\n") else "\n"
    found = EMPTY_FRONT_MATTER.match(rest) or FRONT_MATTER.match(rest)
    if found is None:
        return Readme(mark, "", "", rest, newline)
    return Readme(mark + found[1], found[2], found[3], rest[found.end() :], newline)


def read_metadata(readme: Readme) -> dict[Any, Any]:
    """The front matter's values; raises InputError with the line when it is not a mapping of different keys."""
    try:
        found = yaml.load(readme.metadata, TextLoader)  # noqa: S506  a SafeLoader
        keys = list(_keys(readme.metadata)) if isinstance(found, dict) else []
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{README}: {_place(error, readme)}", HINT) from None
    if found is not None and not isinstance(found, dict):
        raise InputError(
            f"{README}: line {readme.first_line}: the front matter is a {type(found).__name__}, not a mapping", HINT
        )
    names = [key.name for key in keys if key.name is not None]
    for number, key in enumerate(keys):
        if key.name in names[:number]:
            raise InputError(f"{README}: line {readme.first_line + key.line}: a second key {key.name!r}", HINT)
    return found or {}


def edit_metadata(readme: Readme, wanted: Mapping[str, Any], dropped: Sequence[str] = ()) -> Readme:
    """The README with these keys at these values and without the dropped ones; raises InputError as it is read."""
    before = read_metadata(readme)
    gone = [name for name in dropped if name in before]
    if not gone and all(name in before and before[name] == value for name, value in wanted.items()):
        return readme
    edited = _framed(replace(readme, metadata=_edited(readme, before, wanted, gone)))
    expected = {**{name: value for name, value in before.items() if name not in gone}, **wanted}
    try:
        as_meant = _comparable(read_metadata(edited)) == _comparable(expected)
    except InputError:
        as_meant = False
    if not as_meant:
        raise InputError(
            f"{README}: its front matter cannot be edited: a change to one key would break another",
            "write one key a line, without braces and anchors, in the YAML between the two --- lines",
        )
    return edited


def _framed(readme: Readme) -> Readme:
    """The README with both `---` lines where they were missing or touched each other."""
    newline = readme.newline
    if not readme.closing:
        return replace(readme, opening=f"{readme.opening}---{newline}", closing=f"{newline}---{newline}")
    if not readme.closing.startswith(("\r", "\n")):
        return replace(readme, closing=newline + readme.closing)
    return readme


def _comparable(metadata: Mapping[Any, Any]) -> list[tuple[str, str]]:
    """Values as texts, so that a NaN equals itself."""
    return sorted((repr(key), repr(value)) for key, value in metadata.items())


def _edited(readme: Readme, before: Mapping[Any, Any], wanted: Mapping[str, Any], gone: Sequence[str]) -> str:
    """The metadata's text with keys replaced, removed and added."""
    text = readme.metadata + readme.newline if readme.metadata else ""
    pieces, at, new, indent = [], 0, dict(wanted), ""
    for key in _keys(text):
        indent = key.indent
        value = new.pop(key.name, None) if key.name is not None else None
        if key.name not in gone and (value is None or before[key.name] == value):
            continue
        pieces.append(text[at : key.start])
        if key.name not in gone and key.name is not None:
            block = text[key.start : key.end]
            pieces.append(_grown(block, before[key.name], value, readme) or _yaml({key.name: value}, indent, readme))
        at = key.end
    pieces.append(text[at:])
    if new:
        pieces.append(_yaml(new, indent, readme))
    return "".join(pieces).removesuffix("\n").removesuffix("\r")


def _grown(block: str, old: Any, new: Any, readme: Readme) -> str | None:
    """The text of a list, one item a line, with the items that are new at its end; None where it is no such list."""
    first = FIRST_ITEM.search(block)
    if first is None or not isinstance(old, list) or not isinstance(new, list) or new[: len(old)] != old:
        return None
    return block + _yaml(new[len(old) :], first[1], readme)


def _yaml(value: Any, indent: str, readme: Readme) -> str:
    """A value as whole lines of YAML."""
    text: str = yaml.dump(value, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=float("inf"))
    return "".join(f"{indent}{line}{readme.newline}" for line in text.removesuffix("\n").split("\n"))


def _keys(text: str) -> Iterator[Key]:
    """Top-level keys in their order, by the parser's events."""
    events: Iterator[Any] = iter(list(yaml.parse(text, Loader=TextLoader)))
    if not any(isinstance(event, yaml.MappingStartEvent) for event in events):
        return
    for event in events:
        if isinstance(event, yaml.MappingEndEvent):
            return
        _end(event, events)
        mark = event.start_mark
        start = _line_start(text, mark.index)
        end = _line_end(text, _end(next(events), events))
        name = event.value if isinstance(event, yaml.ScalarEvent) else None
        yield Key(name, mark.line, start, end, " " * mark.column)


def _end(event: Any, events: Iterator[Any]) -> int:
    """Where the node that starts with an event has its last character; takes all its events."""
    end: int = event.end_mark.index
    if not isinstance(event, yaml.CollectionStartEvent):
        return end
    for inner in events:
        last = _end(inner, events)
        if isinstance(inner, yaml.CollectionEndEvent):
            return last if event.flow_style else end
        end = last
    return end


def _line_start(text: str, at: int) -> int:
    return max((found.end() for found in LINE_BREAK.finditer(text, 0, at)), default=0)


def _line_end(text: str, at: int) -> int:
    """The start of the next line; a text block ends there already."""
    if at and LINE_BREAK.fullmatch(text, at - 1, at):
        return at
    found = LINE_BREAK.search(text, at)
    return found.end() if found else len(text)


def _place(error: Exception, readme: Readme) -> str:
    """Where and why the metadata is no YAML."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = mark.line if mark else len(LINE_BREAK.findall(readme.metadata[: getattr(error, "position", 0)]))
    reason = getattr(error, "problem", None) or str(error) or type(error).__name__
    return f"line {readme.first_line + line}: not valid YAML: {' '.join(reason.split())}"
