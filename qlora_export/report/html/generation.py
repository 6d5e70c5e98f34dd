"""Greedy generation: for how many tokens an artifact writes what the reference writes."""

from __future__ import annotations

from qlora_export.report.html.elements import Child, Markup, code, joined, quoted
from qlora_export.report.html.figures import DASH, count, counted, fixed
from qlora_export.report.html.reading import Facts, artifacts_with, number, parts, text
from qlora_export.report.html.section import Section, artifact_block, name_of
from qlora_export.report.html.table import Cell, Column, table
from qlora_export.report.html.visible import clipped, clipped_before

LONGEST_PROMPT, LONGEST_REPLY = 400, 600
COLUMNS = (
    Column("artifact"),
    *(
        Column(name, numeric=True)
        for name in ("prompts", "tokens each", "agreed, mean", "agreed, median", "all agreed")
    ),
)
WORST_COLUMNS = (
    Column("place"),
    Column("agreed", numeric=True),
    Column("prompt", wide=True),
    Column("reference", wide=True),
    Column("candidate", wide=True),
)


def generation(report: Facts) -> Section | None:
    """The section, where text was generated."""
    found = [(artifact, facts) for _, artifact, facts in artifacts_with(report, "generation")]
    if not found:
        return None
    lead = (
        "Both models continue the same prompts, always by the most likely token; agreed is until the first other one."
    )
    body = joined(
        table("Agreement of what is generated", COLUMNS, [_row(*item) for item in found], sortable=True),
        [_worst(*item) for item in found if parts(item[1], "worst")],
    )
    return Section("generation", "Generation", lead, body)


def _row(artifact: Facts, facts: Facts) -> list[Cell | Child]:
    prompts, tokens, mean, median, whole = (
        number(facts, key) for key in ("prompts", "tokens", "agreement_mean", "agreement_median", "whole")
    )
    return [
        code(name_of(artifact)),
        Cell(count(prompts), prompts),
        Cell(count(tokens), tokens),
        Cell(fixed(mean, 1), mean),
        Cell(fixed(median, 1), median),
        Cell(count(whole), whole),
    ]


def _worst(artifact: Facts, facts: Facts) -> Markup:
    shown = parts(facts, "worst")
    said = f"{counted(len(shown), 'prompt')} with least agreement"
    caption = f"Where {name_of(artifact)} leaves the reference first"
    return artifact_block(artifact, said, table(caption, WORST_COLUMNS, list(map(_worst_row, shown))))


def _worst_row(item: Facts) -> list[Cell | Child]:
    agreed = number(item, "agreed")
    return [
        text(item, "place"),
        Cell(count(agreed), agreed),
        quoted(clipped_before(text(item, "prompt"), LONGEST_PROMPT)),
        *(_reply(item, key) for key in ("reference", "candidate")),
    ]


def _reply(item: Facts, key: str) -> Child:
    """What was written; a dash where a model wrote nothing because it could not."""
    return DASH if item.get(key) is None else quoted(clipped(text(item, key), LONGEST_REPLY))
