"""The ledger: a row a model, reasons and limits of the verdicts, and what the columns say."""

from __future__ import annotations

from qlora_export.report.html.documents import document_table
from qlora_export.report.html.elements import Child, Markup, code, element, joined
from qlora_export.report.html.figures import (
    DASH,
    fixed,
    ratio_of,
    share,
    significant,
)
from qlora_export.report.html.reading import Facts, adapted, artifacts, labelled, number, part, scored_word, text, texts
from qlora_export.report.html.section import Section, artifact_heading, name_of
from qlora_export.report.html.table import Cell, Column, Line, Row, described, folded, measured, measured_share, table
from qlora_export.report.html.verdicts import SYMBOLS, badge, outcome
from qlora_export.report.terminal import size

NUMBERS = (
    "size", "perplexity", "ratio", "mean KL", "median KL", "99% KL", "same top-1", "gain kept", "survival",
)  # fmt: skip
COLUMNS = (Column("model"), Column("verdict"), *(Column(name, numeric=True) for name in NUMBERS))
LIMITS = {
    "perplexity_ratio": ("ratio", "\u2264", False),
    "mean_kl": ("mean KL", "\u2264", False),
    "same_top1": ("same top-1", "\u2265", True),
    "gain_kept": ("gain kept", "\u2265", True),
    "survival_min": ("lowest survival", "\u2265", True),
}
COLUMN_WORDS: tuple[tuple[str, Child], ...] = (
    ("perplexity", "of the tokens, with its standard error; lower predicts the text better"),
    ("ratio", "of perplexities to that of the reference, token by token on the same text; 1 is no drift"),
    ("mean KL", "how far the distribution over the next token moved, in nats a token; 0 is no drift"),
    ("median and 99% KL", "of the single tokens: the usual one, and the one that one in a hundred exceeds"),
    ("same top-1", "how often both models hold the same token for the most likely one"),
    ("gain kept", "the share of what fine-tuning gained over the base that is left"),
    ("survival", "the share of the adapter's change that is left in the weights, in the layer that lost most"),
    ("\u00b1", "a standard error; the gate judges by the 95% interval, and is inconclusive where that holds the limit"),
)


LABEL_WORDS: dict[str, Child] = {
    "perplexity": "of the labels, the exponential of their mean cross-entropy, with its standard error",
    "ratio": "of perplexities to that of the reference, label by label on the same texts; 1 is no drift",
    "mean KL": "how far the distribution over the labels moved, in nats a text; 0 is no drift",
    "median and 99% KL": "of the single texts: the usual one, and the one that one in a hundred exceeds",
    "same top-1": "how often both models predict the same label",
    "gain kept": "has no number: before training the head was new, and said nothing",
}


def ledger(report: Facts) -> Section:
    """The section of the ledger."""
    checked = bool(part(report, "reference"))
    lead = f"Every model on the same {scored_word(report)}s, compared with the one that was trained."
    if not checked:
        lead = "Nothing was measured: these artifacts were built, and not checked."
    rows = [*_references(report), *(_artifact(facts, place) for place, facts in enumerate(artifacts(report), 1))]
    caption = "Drift from the model that was trained" if checked else "Artifacts"
    body = joined(
        table(caption, COLUMNS, rows, sortable=True) if rows else None,
        folded("What the columns say", described(_column_words(report))) if checked else None,
        _reasons(report),
        document_table(report),
        _limits(report),
    )
    return Section("ledger", "Ledger", lead, body)


def _column_words(report: Facts) -> list[tuple[str, Child]]:
    said = LABEL_WORDS if labelled(report) else {}
    return [(name, said.get(name, words)) for name, words in COLUMN_WORDS]


def _references(report: Facts) -> list[Line]:
    """The rows of what no verdict is about."""
    reference = part(report, "reference")
    if not reference:
        return []
    perplexity = number(reference, "perplexity")
    shown = measured(fixed(perplexity), number(reference, "perplexity_stderr"))
    same, gain = Cell("100%", 1.0), Cell(DASH) if labelled(report) else Cell("100%", 1.0)
    exact = [Cell("1", 1.0), *(Cell("0", 0.0) for _ in range(3)), same, gain, same]
    name = "as trained" if adapted(report) else "the model itself"
    rows = [Line((name, "reference", DASH, Cell(shown, perplexity), *exact), "reference")]
    for label, key in (("base alone", "base"), ("merged, 16 bit", "merged")):
        if drift := part(reference, key):
            rows.append(Line((label, "", DASH, *_drift(drift)), "beside"))
    return rows


def _artifact(artifact: Facts, place: int) -> Line:
    stored = number(artifact, "bytes")
    shown = DASH if stored is None else size(int(stored))
    name = element("span", code(name_of(artifact)), id=f"artifact-{place}")
    return Line((name, badge(artifact), Cell(shown, stored), *_drift(part(artifact, "drift"))))


def _drift(drift: Facts) -> list[Cell]:
    ratio, mean = ratio_of(number(drift, "ln_ppl_ratio")), number(drift, "mean_kl")
    ratio_stderr = number(drift, "ln_ppl_ratio_stderr")
    if ratio is not None and ratio_stderr is not None:
        ratio_stderr *= ratio
    perplexity = number(drift, "perplexity")
    median, most = number(drift, "median_kl"), number(drift, "kl_99")
    same, gain = number(drift, "same_top1"), number(drift, "gain_kept")
    return [
        Cell(measured(fixed(perplexity), number(drift, "perplexity_stderr")), perplexity),
        Cell(measured(fixed(ratio), ratio_stderr), ratio),
        Cell(measured(significant(mean, 2), number(drift, "mean_kl_stderr")), mean),
        Cell(significant(median, 2), median),
        Cell(significant(most, 2), most),
        Cell(measured_share(same, number(drift, "same_top1_stderr")), same),
        Cell(measured_share(gain, number(drift, "gain_kept_stderr")), gain),
        _survival(drift),
    ]


def _survival(drift: Facts) -> Cell:
    lowest, in_outputs = number(drift, "survival_min"), number(drift, "weighted_survival_min")
    if in_outputs is None:
        return Cell(share(lowest), lowest)
    beneath = element("small", f"{share(in_outputs)} in outputs")
    return Cell(joined(share(lowest), " ", beneath), lowest)


def _reasons(report: Facts) -> Markup | None:
    items = [
        element("li", artifact_heading(artifact), element("ul", [element("li", reason) for reason in found]))
        for artifact in artifacts(report)
        if (found := texts(artifact, "reasons"))
    ]
    if not items:
        return None
    return joined(element("h3", "Reasons", class_="aside"), element("ul", items, class_="reasons"))


def _limits(report: Facts) -> Markup | None:
    judged = [(artifact, part(artifact, "limits")) for artifact in artifacts(report) if part(artifact, "limits")]
    if not judged:
        return None
    columns = [Column("artifact"), *(Column(f"{name} {sign}", numeric=True) for name, sign, _ in LIMITS.values())]
    rows: list[Row] = [[code(name_of(artifact)), *_limit_cells(artifact, limits)] for artifact, limits in judged]
    note = element("p", "A dash is a number that is reported and not judged.", class_="said")
    beside = [said for artifact, limits in judged if (said := _yardstick(artifact, limits)) is not None]
    against = element("ul", beside) if beside else None
    return joined(folded("Limits of every artifact", table("Limits that were judged by", columns, rows), note, against))


def _yardstick(artifact: Facts, limits: Facts) -> Markup | None:
    """The other artifact that this one may drift hardly further than, by how much, and what was found."""
    other, found = part(limits, "no_worse_than"), part(artifact, "beside")
    if not other:
        return None
    allowed = [
        f"{name} {sign} {significant(value, 4)}"
        for key, name, sign in (("mean_kl", "mean KL further", "\u2264"), ("perplexity_ratio", "ratio to it", "\u2264"))
        if (value := number(other, key)) is not None
    ]
    measured_words = ""
    if found:
        further, ratio = number(found, "mean_kl"), ratio_of(number(found, "ln_ppl_ratio"))
        measured_words = f"; measured {significant(further, 2)} further, ratio {fixed(ratio)}"
    names = (code(name_of(artifact)), " may be no worse than ", code(text(other, "artifact")))
    return element("li", *names, f": {', '.join(allowed)}{measured_words}")


def _limit_cells(artifact: Facts, limits: Facts) -> list[Cell]:
    broken = _broken(artifact)
    cells = []
    for key, (name, _, is_share) in LIMITS.items():
        value = number(limits, key)
        shown = DASH if value is None else share(value) if is_share else significant(value)
        kind = outcome(artifact) if name in broken else None
        said = joined(SYMBOLS[kind], " ", shown) if kind else shown
        cells.append(Cell(said, value, f"decided {kind}" if kind else None))
    return cells


def _broken(artifact: Facts) -> set[str]:
    """Limits that the verdict names, by the first words of its reasons."""
    if outcome(artifact) == "pass":
        return set()
    found = texts(artifact, "reasons")
    named = {"ratio": "perplexity ratio", "lowest survival": "lowest survival"}
    return {
        name
        for name, _, _ in LIMITS.values()
        if any(reason.startswith(f"{named.get(name, name)} is ") for reason in found)
    }
