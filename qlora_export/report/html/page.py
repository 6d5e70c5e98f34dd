"""The report as one page: `report.html`, made from the plain data of report.json and from nothing else.

No network, no fonts, no libraries; its bytes are a function of the report. Layout: head, list of contents, sections in
the order of `SECTIONS`, each left out where the report has nothing for it. A section is facts, and a template that has
all of their markup. Cost: a fifth of a second and 400 KB for seven artifacts of 84 matrices; the first page imports
jinja2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qlora_export.report.html.choices import choices, predicted_labels
from qlora_export.report.html.distribution import distribution
from qlora_export.report.html.document import document
from qlora_export.report.html.drift_and_size import drift_and_size
from qlora_export.report.html.generation import generation
from qlora_export.report.html.head import head, title
from qlora_export.report.html.layers import layers
from qlora_export.report.html.ledger import ledger
from qlora_export.report.html.provenance import provenance
from qlora_export.report.html.reading import Facts
from qlora_export.report.html.section import Section
from qlora_export.report.html.trace import trace
from qlora_export.report.html.worst import worst
from qlora_export.report.templating import write_whole

PAGE_NAME = "report.html"
SECTIONS: tuple[Callable[[Facts], Section | None], ...] = (
    ledger, distribution, layers, drift_and_size, worst, choices, predicted_labels, generation, trace, provenance,
)  # fmt: skip
ABOUT = "Written by qlora-export from report.json beside it. This page loads nothing and sends nothing."


def page(report: Mapping[str, Any]) -> str:
    """The whole page of a report, as `report.data.report` gives it or report.json holds it."""
    sections = [found for make in SECTIONS if (found := make(report)) is not None]
    return document(title(report), head(report), sections, ABOUT)


def write_page(report: Mapping[str, Any], folder: Path) -> Path:
    """Write report.html into the run folder, whole or not at all."""
    return write_whole(page(report), folder / PAGE_NAME)
