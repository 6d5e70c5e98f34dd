"""A comparison as one page, made from what `compare --json` prints: which artifact to take, drift, size and costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_export.report.html.costs import costs, not_made
from qlora_export.report.html.document import document
from qlora_export.report.html.drift_and_size import drift_and_size
from qlora_export.report.html.figures import counted
from qlora_export.report.html.ledger import ledger
from qlora_export.report.html.provenance import provenance
from qlora_export.report.html.reading import Facts, number, part, parts, scored_word, text, texts
from qlora_export.report.html.section import Section
from qlora_export.report.templating import write_whole

ABOUT = "Written by qlora-export compare. This page loads nothing and sends nothing."


def comparison_page(comparison: Mapping[str, Any]) -> str:
    """The whole page of a comparison, as `report.comparison.comparison_data` gives it."""
    report = _as_report(comparison)
    made = (
        ledger(report),
        drift_and_size(report),
        costs(comparison),
        not_made(comparison),
        provenance(report),
    )
    sections = [section for section in made if section is not None]
    return document(_title(comparison), _head(comparison, report), sections, ABOUT)


def write_comparison_page(comparison: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a comparison, whole or not at all."""
    return write_whole(comparison_page(comparison), path)


def _as_report(comparison: Facts) -> dict[str, Any]:
    """The rows that were measured as artifacts of a report, all with the limits of the recipe."""
    limits = dict(part(comparison, "limits"))
    measured = [{**row, "limits": limits} for row in parts(comparison, "rows") if part(row, "drift")]
    kept = {key: comparison.get(key) for key in ("recipe_digest", "tokens", "reference")}
    return {**kept, "artifacts": measured, "assumptions": texts(comparison, "notes")}


def _title(comparison: Facts) -> str:
    chosen = text(comparison, "recommended")
    return f"Comparison: take {chosen}" if chosen else "Comparison: none keeps the limits"


def _head(comparison: Facts, report: Facts) -> Section:
    many = counted(len(parts(report, "artifacts")), "artifact")
    tokens = number(part(comparison, "tokens"), "count")
    on = "" if tokens is None else f", on {counted(tokens, scored_word(comparison))} of held-out text"
    lead = f"{many}, compared with the model that was trained{on}."
    facts = {"chosen": text(comparison, "recommended"), "why": texts(comparison, "why")}
    return Section("head", "Comparison", lead, "comparison_head.html", facts)
