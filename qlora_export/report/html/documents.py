"""Perplexity by word and by byte, where whole documents were scored: models with other tokenizers share these."""

from __future__ import annotations

from qlora_export.report.html.elements import Child, Markup, code, element, joined
from qlora_export.report.html.figures import fixed
from qlora_export.report.html.reading import Facts, number, part
from qlora_export.report.html.table import Cell, Column, Line, table

KEYS = {"word_perplexity": "word perplexity", "byte_perplexity": "byte perplexity", "bits_per_byte": "bits a byte"}
COLUMNS = (Column("model"), *(Column(name, numeric=True) for name in KEYS.values()))


def document_table(report: Facts) -> Markup | None:
    """The table, where the report has these numbers."""
    found = part(report, "document_perplexity")
    reference, measured = part(found, "reference"), part(found, "artifacts")
    if not reference:
        return None
    rows = [_line("reference", reference, "reference")]
    rows += [_line(code(name), part(measured, name)) for name in measured]
    drawn = table("Perplexity of whole documents", COLUMNS, rows, sortable=True)
    return joined(element("h3", "By word and by byte", class_="aside"), drawn)


def _line(name: Child, numbers: Facts, kind: str | None = None) -> Line:
    values = [number(numbers, key) for key in KEYS]
    return Line((name, *(Cell(fixed(value), value) for value in values)), kind)
