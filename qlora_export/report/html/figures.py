"""Numbers as people read them; what is not known is a dash."""

from __future__ import annotations

import math

from qlora_export.report.terminal import size

DASH = "\u2013"
SUPERSCRIPTS = str.maketrans("0123456789-", "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b")
LARGEST_EXPONENT = 700.0
LARGEST_PLAIN = 100_000.0


def significant(value: float | None, digits: int = 3) -> str:
    """A number by its first digits; a power of ten where there are many zeros."""
    if value is None:
        return DASH
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    if exponent and 1 <= abs(value) < LARGEST_PLAIN:
        mantissa, exponent = f"{float(f'{value:.{digits}g}'):,.0f}", ""
    if exponent:
        mantissa = {"1": "", "-1": "-"}.get(mantissa, f"{mantissa}\u00d7")
        mantissa = f"{mantissa}10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    return mantissa.replace("-", "\u2212")


def fixed(value: float | None, places: int = 4) -> str:
    """A number with so many places after the point, or by its first digits where it is large or tiny."""
    if value is None:
        return DASH
    if value and not 0.001 <= abs(value) < LARGEST_PLAIN:
        return significant(value, places)
    if abs(value) >= 100:
        return f"{value:,.1f}".replace("-", "\u2212")
    return f"{value:.{places}f}".replace("-", "\u2212")


def share(value: float | None, places: int = 1) -> str:
    """A share in per cent."""
    if value is None:
        return DASH
    return f"{significant(value * 100, 3)}%" if abs(value) >= 1000 else f"{value:.{places}%}".replace("-", "\u2212")


def count(value: float | None) -> str:
    """How many."""
    return DASH if value is None else f"{value:,.0f}"


def counted(value: float | None, word: str) -> str:
    """How many of what: 1 token, 2 tokens."""
    return f"{count(value)} {word}" if value == 1 else f"{count(value)} {word}s"


def stored(value: float | None) -> str:
    """How many bytes."""
    return DASH if value is None else size(int(value))


def exact(value: float) -> str:
    """A number as a script reads it again."""
    return repr(float(value))


def ratio_of(logarithm: float | None) -> float | None:
    """The ratio whose natural logarithm this is."""
    return None if logarithm is None or logarithm > LARGEST_EXPONENT else math.exp(logarithm)


def short(value: float) -> str:
    """A coordinate, to a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
