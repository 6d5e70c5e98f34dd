"""The report as one page: `report.html`, made from the plain data of report.json and from nothing else.

No network, no fonts, no libraries; its bytes are a function of the report. Layout: head, list of contents, sections in
the order of `SECTIONS`, each left out where the report has nothing for it. Cost: some milliseconds, tens of kilobytes
an artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qlora_export.report.html.assets import policy, script, style
from qlora_export.report.html.choices import choices
from qlora_export.report.html.distribution import distribution
from qlora_export.report.html.drift_and_size import drift_and_size
from qlora_export.report.html.elements import Markup, element, joined
from qlora_export.report.html.generation import generation
from qlora_export.report.html.head import head, title
from qlora_export.report.html.layers import layers
from qlora_export.report.html.ledger import ledger
from qlora_export.report.html.provenance import provenance
from qlora_export.report.html.reading import Facts
from qlora_export.report.html.section import Section
from qlora_export.report.html.trace import trace
from qlora_export.report.html.worst import worst

PAGE_NAME = "report.html"
SECTIONS: tuple[Callable[[Facts], Section | None], ...] = (
    ledger, distribution, layers, drift_and_size, worst, choices, generation, trace, provenance,
)  # fmt: skip
ABOUT = "Written by qlora-export from report.json beside it. This page loads nothing and sends nothing."


def page(report: Mapping[str, Any]) -> str:
    """The whole page of a report, as `report.data.report` gives it or report.json holds it."""
    sections = [found for make in SECTIONS if (found := make(report)) is not None]
    return f"<!doctype html>\n{element('html', _head(report), _body(report, sections), lang='en')}\n"


def write_page(report: Mapping[str, Any], folder: Path) -> Path:
    """Write report.html into the run folder, whole or not at all."""
    path = folder / PAGE_NAME
    partial = path.with_suffix(".html.partial")
    partial.write_text(page(report), encoding="utf-8", newline="\n")
    partial.rename(path)
    return path


def _head(report: Facts) -> Markup:
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy()),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title(report)),
        element("style", Markup(style())),
    )


def _body(report: Facts, sections: list[Section]) -> Markup:
    links = [element("li", element("a", section.heading, href=f"#{section.place}")) for section in sections]
    contents = element("nav", element("ul", links), aria_label="Contents")
    return element(
        "body",
        element("a", "Skip to the numbers", href="#numbers", class_="skip"),
        head(report),
        contents,
        element("main", joined(section.html() for section in sections), id="numbers", tabindex="-1"),
        element("footer", element("p", ABOUT)),
        element("script", Markup(script())),
    )
