"""A verdict by word, symbol and colour, never by colour alone."""

from __future__ import annotations

from qlora_export.report.html.reading import Facts, text

SYMBOLS = {"pass": "\u2713", "fail": "\u2717", "inconclusive": "?", "not-measured": "\u2013"}
WORDS = {"not-measured": "not measured"}


def outcome(artifact: Facts) -> str:
    """The artifact's verdict, `not-measured` where there is none that we know."""
    found = text(artifact, "verdict")
    return found if found in SYMBOLS else "not-measured"


def verdict_words(artifact: Facts) -> str:
    """The verdict, and whether it is the expected one where that says something."""
    found = outcome(artifact)
    expected = text(artifact, "expected") or "pass"
    if found == "fail" and expected == "fail":
        return "fail, as expected"
    if found in ("pass", "inconclusive") and expected == "fail":
        return f"{found}, expected to fail"
    return WORDS.get(found, found)


def surprising(artifact: Facts) -> bool:
    """Whether it was judged, and not as the recipe expects."""
    return outcome(artifact) not in ("not-measured", text(artifact, "expected") or "pass")
