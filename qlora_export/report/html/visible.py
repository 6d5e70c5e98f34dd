"""Text of strangers so that a reader sees every character of it: nothing hides, nothing turns a line around.

Ends of lines and tabs become arrows; other characters without a shape of their own (controls, direction marks, spaces
of zero width, half surrogates, fillers) become their number in angle brackets. Pictures of control characters would be
shorter, but few fonts have them. What is left can be printed, and is escaped for HTML elsewhere.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

LINE_END = "\u21b5"
TAB = "\u21e5"
EDGE_SPACE = "\u2423"
DOTTED_CIRCLE = "\u25cc"
SHAPELESS = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"})
# Letters and marks by their category, and nothing to see: fillers, joiners, selectors, the empty Braille cell.
BLANK = frozenset({0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x2800, 0x3164, 0xFFA0})
SELECTORS = (range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0))


def visible(text: str) -> str:
    """The text in one line, every character of it to be seen; a mark that has no letter before it gets a circle."""
    if text.isascii() and text.isprintable():
        return text
    if text and unicodedata.category(text[0]).startswith("M"):
        text = DOTTED_CIRCLE + text
    return "".join(map(_visible, text))


def visible_edges(text: str) -> str:
    """The same with spaces at both ends as marks, for single tokens."""
    inner = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    after = len(text) - before - len(inner)
    return EDGE_SPACE * before + visible(inner) + EDGE_SPACE * after


def clipped(text: str, most: int) -> str:
    """The text's first characters, and an ellipsis where there are more."""
    return text if len(text) <= most else text[:most] + "\u2026"


def clipped_before(text: str, most: int) -> str:
    """The text's last characters, and an ellipsis where there are more."""
    return text if len(text) <= most else "\u2026" + text[-most:]


@lru_cache(4096)
def _visible(character: str) -> str:
    code = ord(character)
    if character == " ":
        return character
    if character == "\n":
        return LINE_END
    if character == "\t":
        return TAB
    if unicodedata.category(character) in SHAPELESS or code in BLANK or any(code in span for span in SELECTORS):
        return f"\u27e8U+{code:04X}\u27e9"
    return character
