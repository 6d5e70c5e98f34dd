"""The report as Markdown: `report.md` beside `report.json`, for pull requests and step summaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_export.drift.layers import lowest
from qlora_export.drift.ledger import Entry, Ledger
from qlora_export.drift.results import Drift
from qlora_export.report import templating
from qlora_export.report.calibration import calibration_lines
from qlora_export.report.layers import SHOWN
from qlora_export.report.probes import probe_lines
from qlora_export.report.run import Reported
from qlora_export.report.tokens import protocol_line, tokens_data

if TYPE_CHECKING:
    from jinja2 import Environment

MARKDOWN_NAME = "report.md"


@dataclass(frozen=True)
class ArtifactRow:
    """One artifact's line in the table."""

    name: str
    bytes: int
    drift: Drift
    verdict: str


def markdown(run: Reported) -> str:
    """The whole report as one Markdown text."""
    entries = run.ledger.entries if run.ledger else ()
    kept = [(entry, lowest(entry.layers, SHOWN)) for entry in entries if entry.artifact.name in run.facts.rounded]
    return _environment().get_template("report.md").render(
        run=run,
        table=_table(run.ledger) if run.ledger else "",
        steps=[(entry.artifact.name, step) for entry in entries for step in entry.findings.steps],
        reasons=[(entry.artifact.name, reason) for entry in entries for reason in entry.verdict.reasons],
        probes=[(entry.artifact.name, line) for entry in entries for line in probe_lines(entry)],
        layers=[(entry.artifact.name, layer) for entry, layers in kept for layer in layers],
        calibration=[(item.name, line) for item in run.artifacts for line in calibration_lines(item.manifest)],
    )  # fmt: skip


def write_markdown(run: Reported, folder: Path) -> Path:
    """Write report.md into the run folder, whole or not at all."""
    return templating.write_whole(markdown(run), folder / MARKDOWN_NAME)


def ledger_table(reference: float, base: Drift | None, merged: Drift | None, artifacts: Sequence[ArtifactRow]) -> str:
    """The ledger as a Markdown table: the reference by its perplexity, what it is compared with, the artifacts."""
    template = _environment().get_template("ledger.md")
    return template.render(reference=reference, base=base, merged=merged, artifacts=artifacts)


def _table(ledger: Ledger) -> str:
    rows = [
        ArtifactRow(entry.artifact.name, entry.artifact.bytes, entry.drift, _verdict(entry)) for entry in ledger.entries
    ]
    return ledger_table(ledger.reference.perplexity, ledger.base, ledger.merged, rows)


def _verdict(entry: Entry) -> str:
    expected = ", as expected" if entry.as_expected and entry.verdict.outcome == "fail" else ""
    return f"{entry.verdict.outcome}{expected}"


@cache
def _environment() -> Environment:
    """The templates, whose values stand in the report as they are."""
    filters = (exp, len, protocol_line, templating.number, tokens_data)
    return templating.environment("qlora_export.report", filters, {}, None)
