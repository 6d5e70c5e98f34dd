"""Words of people and of the run inside Markdown: no markup of theirs takes effect, no path of a machine is shown.

A path counts as one of this machine when it is absolute or starts at a home folder; its last name is shown instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

MACHINE_PATH = re.compile(
    r"""(?<![^\s(\[{'"=:,`]) (?: (?:file:)?//(?=/) | ~\w*(?=[/\\]) | [A-Za-z]:(?=[/\\]) )?
    [/\\] (?:[^\s/\\:;,'"]+[/\\])* ([^\s/\\:;,'"]+) [/\\]*""",
    re.VERBOSE,
)
WHOLE_MACHINE_PATH = re.compile(
    r"(?P<kind>(?!file:)[a-z]{2,}:(?!//))?(?:file://)?(?:~[^/\\]*|[A-Za-z]:)?[/\\].*", re.DOTALL
)
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\\": "&#92;", "$": "&#36;"}
LIVE_IN_TEXT = {**ENTITIES, **{character: f"\\{character}" for character in "`*_[]|~#"}}
STARTS_A_BLOCK = re.compile(r"^(?:[-+=:]|\d+(?=[.)]))")
# Whatever could end a code block, or be taken for a comment of HTML, is written as an escape of YAML.
LIVE_IN_CODE = re.compile(r"[<`]")


def escape(text: str) -> str:
    """One line of plain text as Markdown that shows exactly this text, without paths of a machine."""
    line = "".join(LIVE_IN_TEXT.get(character, character) for character in _one_line(text))
    return STARTS_A_BLOCK.sub(lambda found: f"&#{ord(found[0][0])};{found[0][1:]}", line)


def code(text: str) -> str:
    """A name as inline code, whatever backticks it holds."""
    line = _one_line(text)
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {line} {fence}" if longest else f"`{line}`"


def without_paths(text: str) -> str:
    """A text in which absolute paths are cut down to their last name."""
    return MACHINE_PATH.sub(lambda found: found[1], text)


def _one_line(text: str) -> str:
    """A text without paths, line breaks, and characters that nobody sees."""
    visible = "".join(character if character.isprintable() else " " for character in without_paths(text))
    return " ".join(visible.split())


def public_value(value: Any) -> Any:
    """A recipe's value as it may be shown: without machine paths, without keys that say nothing."""
    if isinstance(value, str):
        found = WHOLE_MACHINE_PATH.fullmatch(value)
        return f"{found['kind'] or ''}{_last_name(value)}" if found else value
    if isinstance(value, Mapping):
        shown = {str(key): public_value(item) for key, item in value.items()}
        return {key: item for key, item in shown.items() if item not in (None, {}, [])}
    if isinstance(value, (list, tuple)):
        return [public_value(item) for item in value]
    return value


def recipe_yaml(recipe: Mapping[str, Any]) -> str:
    """A recipe as YAML that can stand in a code block."""
    text: str = yaml.dump(
        public_value(recipe), Dumper=_CodeDumper, sort_keys=False, allow_unicode=False, width=float("inf")
    )
    return LIVE_IN_CODE.sub(lambda found: f"\\x{ord(found[0]):02X}", text)


def _last_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


class _CodeDumper(yaml.SafeDumper):
    """YAML whose strings stand in double quotes where they need an escape."""


def _represent(dumper: _CodeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if LIVE_IN_CODE.search(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_CodeDumper.add_representer(str, _represent)
