"""Words of people and of the run inside Markdown: no markup of theirs takes effect, no path of a machine is shown.

What is ready to stand in a card is a `Markup`; templates pass all else through `escape`, in code through `literal`.

A path counts as one of this machine when it is absolute or starts at a home folder; its last name is shown instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml
from markupsafe import Markup

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
LIVE_IN_LITERAL = re.compile(r"""[\\"'`<{}]|[^ -~]""")


def escape(text: str) -> Markup:
    """One line of plain text as Markdown that shows exactly this text, without paths of a machine."""
    line = "".join(LIVE_IN_TEXT.get(character, character) for character in _one_line(text))
    return Markup(STARTS_A_BLOCK.sub(lambda found: f"&#{ord(found[0][0])};{found[0][1:]}", line))  # noqa: S704 - no markup


def code(text: object) -> Markup:
    """A name as inline code, whatever backticks it holds."""
    line = _one_line(str(text))
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    return Markup(f"{fence} {line} {fence}" if longest else f"`{line}`")  # noqa: S704 - ends with its own backticks


def literal(text: str) -> Markup:
    """A text between the quotes of a string in code, which it cannot leave, nor the block that the code stands in."""
    return Markup(LIVE_IN_LITERAL.sub(lambda found: _escape_of(found[0]), text))  # noqa: S704 - nothing is live


def as_json(value: Any) -> Markup:
    """A list of names as code."""
    return Markup(json.dumps(value))  # noqa: S704 - one line of ASCII


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


def recipe_yaml(recipe: Mapping[str, Any]) -> Markup:
    """A recipe as YAML that can stand in a code block."""
    text: str = yaml.dump(
        public_value(recipe), Dumper=_CodeDumper, sort_keys=False, allow_unicode=False, width=float("inf")
    )
    return Markup(LIVE_IN_CODE.sub(lambda found: _escape_of(found[0]), text))  # noqa: S704 - nothing is live


def _escape_of(character: str) -> str:
    """A character as YAML and the strings of Python and JavaScript write it."""
    return f"\\x{ord(character):02X}" if character.isascii() else character.encode("unicode_escape").decode()


def _last_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


class _CodeDumper(yaml.SafeDumper):
    """YAML whose strings stand in double quotes where they need an escape."""


def _represent(dumper: _CodeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if LIVE_IN_CODE.search(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_CodeDumper.add_representer(str, _represent)
