"""The head of the page: what was compared with what, every verdict at a glance, what the exit code means."""

from __future__ import annotations

from collections import Counter

from qlora_export.report.exit_codes import CODES
from qlora_export.report.html.elements import Markup, code, element, joined
from qlora_export.report.html.figures import count, counted, ratio_of, share, significant
from qlora_export.report.html.reading import Facts, artifacts, number, part, scored_word, text
from qlora_export.report.html.section import name_of
from qlora_export.report.html.verdicts import SYMBOLS, badge, marked, outcome, surprising, verdict_words
from qlora_export.report.terminal import size

GATE_CODES = {0: "pass", 3: "fail", 11: "inconclusive"}


def title(report: Facts) -> str:
    """The title of the page: how many verdicts of each kind."""
    found = "; ".join(f"{count(many)} {words}" for words, _, many in _verdicts(report))
    return f"Release report: {found}" if found else "Release report"


def head(report: Facts) -> Markup:
    """The head as an element."""
    tally = [marked(kind, f"{count(many)} {words}") for words, kind, many in _verdicts(report)]
    return element(
        "header",
        element("p", "qlora-export", class_="brand"),
        element("h1", "Release report"),
        element("p", _compared(report), class_="lead"),
        element("p", tally, class_="tally") if tally else None,
        _cards(report),
        _exit_code(report),
    )


def _with_code(said: str) -> Markup:
    """A sentence whose words between backticks are code."""
    return joined(code(words) if place % 2 else words for place, words in enumerate(said.split("`")))


def _verdicts(report: Facts) -> list[tuple[str, str, int]]:
    """Words, outcome and number of every kind of verdict that there is."""
    tally = Counter((outcome(artifact), verdict_words(artifact)) for artifact in artifacts(report))
    order = list(SYMBOLS)
    found = sorted(tally.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    return [(words, kind, many) for (kind, words), many in found]


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


def _cards(report: Facts) -> Markup | None:
    cards = [_card(artifact, place) for place, artifact in enumerate(artifacts(report), 1)]
    return element("ul", cards, class_="cards", aria_label="Verdicts at a glance") if cards else None


def _card(artifact: Facts, place: int) -> Markup:
    drift = part(artifact, "drift")
    facts = [
        ("mean KL", significant(number(drift, "mean_kl"), 2)),
        ("ratio", significant(ratio_of(number(drift, "ln_ppl_ratio")), 4)),
        ("same top-1", share(number(drift, "same_top1"))),
    ]
    numbers = [element("span", element("b", shown), f" {name}") for name, shown in facts] if drift else []
    stored = number(artifact, "bytes")
    what = ", ".join(word for word in (text(artifact, "format"), "" if stored is None else size(int(stored))) if word)
    return element(
        "li",
        element("a", name_of(artifact), href=f"#artifact-{place}", class_="name"),
        element("span", badge(artifact), element("span", what, class_="said"), class_="state"),
        element("span", numbers, class_="numbers") if numbers else None,
        class_=f"card {outcome(artifact)}{' surprising' if surprising(artifact) else ''}",
    )


def _exit_code(report: Facts) -> Markup | None:
    found = number(report, "exit_code")
    if found is None:
        return None
    known = next((item for item in CODES if item.number == found), None)
    meaning = known.meaning if known else "A code that this version does not know."
    kind = GATE_CODES.get(int(found), "fail")
    advice = element("p", _with_code(known.action), class_="said") if known and found else None
    said = element("p", element("b", f"Exit code {found:.0f}"), " ", _with_code(meaning))
    return element("div", said, advice, class_=f"exit {kind}")
