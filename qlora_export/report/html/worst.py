"""Where an artifact drifted most: single tokens with the text before them, and whole windows."""

from __future__ import annotations

from qlora_export.report.html.figures import share, significant
from qlora_export.report.html.reading import Facts, artifacts_with, labelled, number, parts, scored_word
from qlora_export.report.html.section import Section


def worst(report: Facts) -> Section | None:
    """The section, where the report names tokens or windows."""
    found = [(artifact, parts(facts, "tokens"), parts(facts, "windows"))
             for _, artifact, facts in artifacts_with(report, "worst")]  # fmt: skip
    blocks = [(*item, _largest(item[1])) for item in found if item[1] or item[2]]
    if not blocks:
        return None
    word = scored_word(report)
    lead = (
        f"The {word}s that drifted most, marked in their text: what the reference held for most likely there, what the "
        f"artifact did, and what both gave the {word} of the text."
    )
    heading = "Worst labels" if labelled(report) else "Worst tokens and windows"
    facts = {"blocks": blocks, "word": word, "probability": _probability, "order": _order}
    return Section("worst", heading, lead, "worst.html", facts)


def _largest(tokens: list[Facts]) -> str:
    return f"up to {significant(max(number(token, 'kl') or 0.0 for token in tokens), 2)} nats" if tokens else ""


def _probability(value: float | None) -> str:
    """A probability in per cent, by its first digits where it is tiny."""
    return share(value) if value is None or value >= 0.001 else f"{significant(value * 100, 1)}%"


def _order(item: Facts) -> float | None:
    """What places are sorted by: the window, and for a token its place in it."""
    window = number(item, "window")
    return None if window is None else window * 1e6 + (number(item, "position") or 0.0)
