"""Multiple choice and labels: how often each model answers right, and the questions or texts whose answer flipped."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_export.report.html.elements import Child, Markup, code, element, joined, quoted
from qlora_export.report.html.figures import count, counted, share, significant
from qlora_export.report.html.reading import Facts, artifacts_with, number, parts, text
from qlora_export.report.html.section import Section, artifact_block, name_of
from qlora_export.report.html.table import Cell, Column, measured_share, table
from qlora_export.report.html.visible import clipped

LONGEST_QUESTION, LONGEST_ANSWER = 600, 200
COLUMNS = (
    Column("artifact"),
    *(Column(name, numeric=True) for name in ("items", "reference right", "right", "lost", "gained", "p-value")),
)
P_VALUE = "p-value: of so uneven a split of lost and gained by chance alone (McNemar's exact test)."


@dataclass(frozen=True)
class _Kind:
    """What was answered, as the report has it, and the words for it."""

    key: str
    heading: str
    lead: str
    item: str
    right: str


QUESTIONS = _Kind(
    "choices",
    "Multiple choice",
    "Questions with answers to choose from. Equal scores can hide flips: lost and gained count them.",
    "question",
    "right answer",
)
LABELS = _Kind(
    "labels",
    "Labels",
    "What the models predict of the texts. Equal accuracies can hide flips: lost and gained count them.",
    "text",
    "label",
)


def choices(report: Facts) -> Section | None:
    """The section, where questions were asked."""
    return _answers(report, QUESTIONS)


def predicted_labels(report: Facts) -> Section | None:
    """The section of a classifier."""
    return _answers(report, LABELS)


def _answers(report: Facts, kind: _Kind) -> Section | None:
    found = [(artifact, facts) for _, artifact, facts in artifacts_with(report, kind.key)]
    if not found:
        return None
    return Section(
        kind.key,
        kind.heading,
        kind.lead,
        joined(
            table("Answers of every artifact", COLUMNS, [_row(*item) for item in found], sortable=True),
            element("p", P_VALUE, class_="said"),
            [_flips(*item, kind) for item in found if parts(item[1], "flipped")],
        ),
    )


def _row(artifact: Facts, facts: Facts) -> list[Cell | Child]:
    items, reference, right, lost, gained, chance = (
        number(facts, key) for key in ("items", "accuracy_reference", "accuracy", "lost", "gained", "p_value")
    )
    return [
        code(name_of(artifact)),
        Cell(count(items), items),
        Cell(share(reference), reference),
        Cell(measured_share(right, number(facts, "accuracy_stderr")), right),
        Cell(count(lost), lost),
        Cell(count(gained), gained),
        Cell(significant(chance, 2), chance),
    ]


def _flips(artifact: Facts, facts: Facts, kind: _Kind) -> Markup:
    flipped = parts(facts, "flipped")
    columns = (
        Column("place"),
        Column(kind.item, wide=True),
        Column(kind.right),
        Column("reference chose"),
        Column("candidate chose"),
    )
    caption = f"{kind.item.capitalize()}s that {name_of(artifact)} answers otherwise"
    rows = [_flip_row(item) for item in flipped]
    return artifact_block(artifact, counted(len(flipped), "flip"), table(caption, columns, rows))


def _flip_row(item: Facts) -> list[Child]:
    answers = [quoted(clipped(text(item, key), LONGEST_ANSWER)) for key in ("answer", "reference", "candidate")]
    return [text(item, "place"), quoted(clipped(text(item, "question"), LONGEST_QUESTION)), *answers]
