"""Multiple choice: how often each model answers right, and the questions whose answer flipped."""

from __future__ import annotations

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
FLIPPED_COLUMNS = (
    Column("place"),
    Column("question", wide=True),
    Column("right answer"),
    Column("reference chose"),
    Column("candidate chose"),
)


def choices(report: Facts) -> Section | None:
    """The section, where questions were asked."""
    found = [(artifact, facts) for _, artifact, facts in artifacts_with(report, "choices")]
    if not found:
        return None
    lead = "Questions with answers to choose from. Equal scores can hide flips: lost and gained count them."
    note = "p-value: of so uneven a split of lost and gained by chance alone (McNemar's exact test)."
    return Section(
        "choices",
        "Multiple choice",
        lead,
        joined(
            table("Answers of every artifact", COLUMNS, [_row(*item) for item in found], sortable=True),
            element("p", note, class_="said"),
            [_flips(*item) for item in found if parts(item[1], "flipped")],
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


def _flips(artifact: Facts, facts: Facts) -> Markup:
    flipped = parts(facts, "flipped")
    caption = f"Questions that {name_of(artifact)} answers otherwise"
    rows = [_flip_row(item) for item in flipped]
    return artifact_block(artifact, counted(len(flipped), "flip"), table(caption, FLIPPED_COLUMNS, rows))


def _flip_row(item: Facts) -> list[Child]:
    answers = [quoted(clipped(text(item, key), LONGEST_ANSWER)) for key in ("answer", "reference", "candidate")]
    return [text(item, "place"), quoted(clipped(text(item, "question"), LONGEST_QUESTION)), *answers]
