"""The head of the page: what was compared with what, every verdict at a glance, what the exit code means."""

from __future__ import annotations

from collections import Counter

from qlora_export.report.exit_codes import CODES
from qlora_export.report.html.figures import count, counted
from qlora_export.report.html.reading import Facts, artifacts, number, part, scored_word, text
from qlora_export.report.html.section import Section
from qlora_export.report.html.verdicts import SYMBOLS, outcome, verdict_words

GATE_CODES = {0: "pass", 3: "fail", 11: "inconclusive"}


def title(report: Facts) -> str:
    """The title of the page: how many verdicts of each kind."""
    found = "; ".join(words for _, words in _tally(report))
    return f"Release report: {found}" if found else "Release report"


def head(report: Facts) -> Section:
    """What stands above the sections."""
    code = number(report, "exit_code")
    known = next((item for item in CODES if item.number == code), None)
    facts = {
        "tally": _tally(report),
        "artifacts": artifacts(report),
        "exit_code": code,
        "kind": "" if code is None else GATE_CODES.get(int(code), "fail"),
        "meaning": known.meaning if known else "A code that this version does not know.",
        "action": known.action if known and code else "",
    }
    return Section("head", "Release report", _compared(report), "head.html", facts)


def _tally(report: Facts) -> list[tuple[str, str]]:
    """Every kind of verdict that there is: its outcome, and words that say how many there are."""
    tally = Counter((outcome(artifact), verdict_words(artifact)) for artifact in artifacts(report))
    order = list(SYMBOLS)
    found = sorted(tally.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    return [(kind, f"{count(many)} {words}") for (kind, words), many in found]


def _compared(report: Facts) -> str:
    many = counted(len(artifacts(report)), "artifact")
    reference, tokens = part(report, "reference"), part(report, "tokens")
    if not reference:
        return f"{many}; nothing was measured."
    model = text(reference, "model")
    against = "the model itself" if model == "the model itself" else "the model that was trained"
    made = f" ({model})" if model not in ("", against) else ""
    measured = number(tokens, "count")
    on = "" if measured is None else f", on {counted(measured, scored_word(report))} of held-out text"
    return f"{many}, compared with {against}{made}{on}."
