"""The part of a README that is ours, between two comments on lines of their own; everything around it is people's.

<!-- qlora-export:begin -->
...
<!-- qlora-export:end -->
"""

from __future__ import annotations

import re

from qlora_export.errors import RemoteConflict
from qlora_export.publish.card.front_matter import README, Readme

BEGIN = "<!-- qlora-export:begin -->"
END = "<!-- qlora-export:end -->"
MARKER = re.compile(r"(?:(?<=[\r\n])|\A)[ \t]*(<!-- qlora-export:(begin|end) -->)[ \t]*(?=[\r\n]|\Z)")
LINE_BREAKS_AT_END = re.compile(r"(?:\r\n|\r|\n)*\Z")
LINE_BREAK = re.compile(r"\r\n|\r|\n")


def find_block(readme: Readme) -> tuple[int, int] | None:
    """Where in the prose the block starts and ends, if there is one; raises RemoteConflict when that is not clear."""
    markers = list(MARKER.finditer(readme.prose))
    if not markers:
        return None
    _require_one_pair(readme, markers)
    return markers[0].start(1), markers[1].end(1)


def place_block(readme: Readme, content: str, title: str) -> str:
    """The prose with our block in its place, or at its end; without prose, below the title."""
    newline, prose = readme.newline, readme.prose
    block = f"{BEGIN}\n{content.strip()}\n{END}".replace("\n", newline)
    if found := find_block(readme):
        start, end = found
        return prose[:start] + block + prose[end:]
    heading = "" if prose.strip() else f"{title}{newline * 2}"
    return f"{prose}{_gap(readme)}{heading}{block}{newline}"


def _gap(readme: Readme) -> str:
    """What is missing to an empty line at the end."""
    at_end = LINE_BREAKS_AT_END.search(readme.text)
    breaks = len(LINE_BREAK.findall(at_end[0])) if at_end else 0
    return readme.newline * max(0, 2 - breaks)


def _require_one_pair(readme: Readme, markers: list[re.Match[str]]) -> None:
    """Raise RemoteConflict unless there is one begin and one end below it."""
    kinds = [marker[2] for marker in markers]
    if kinds == ["begin", "end"]:
        return
    if kinds[0] == "end":
        number, what = 0, "has no begin above it"
    elif len(kinds) == 1:
        number, what = 0, "has no end below it"
    else:
        number = 1 if kinds[1] == "begin" else 2
        what = "is the second one"
    before = readme.opening + readme.metadata + readme.closing + readme.prose[: markers[number].start(1)]
    raise RemoteConflict(
        f"{README}: line {len(LINE_BREAK.findall(before)) + 1}: {markers[number][1]} {what}",
        f"leave one line {BEGIN} and one line {END} below it in README.md, or neither, then run again",
    )
