"""Tables: a caption, heads with their scope, numbers to the right, and a container of their own to scroll in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from qlora_export.report.html.elements import Child, Markup, element, joined
from qlora_export.report.html.figures import DASH, share, significant


@dataclass(frozen=True)
class Column:
    """A column's head; `note` in small, `numeric` ones stand to the right, `wide` ones hold text that needs room."""

    name: str
    numeric: bool = False
    wide: bool = False
    note: str = ""

    @property
    def kind(self) -> str | None:
        """The class of its cells."""
        return "number" if self.numeric else "wide" if self.wide else None


@dataclass(frozen=True)
class Cell:
    """What a cell shows, the number it is sorted by, and a class of its own."""

    content: Child
    value: float | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Line:
    """A row; its first cell is its head."""

    cells: Sequence[Cell | Child]
    kind: str | None = None


Row: TypeAlias = "Line | Sequence[Cell | Child]"


def table(caption: str, columns: Sequence[Column], rows: Sequence[Row], sortable: bool = False) -> Markup:
    """A table; a sortable one gets buttons in its heads where there are scripts."""
    heads = [_head(column) for column in columns]
    lines = [row if isinstance(row, Line) else Line(row) for row in rows]
    whole = element(
        "table",
        element("caption", element("span", caption)),
        element("thead", element("tr", heads)),
        element("tbody", [_row(line, columns) for line in lines]),
        data_sortable=sortable,
    )
    return element("div", whole, class_="scroll", role="group", tabindex="0", aria_label=caption)


def folded(summary: Child, *content: Child, opened: bool = False) -> Markup:
    """Content that is there on demand, and in print."""
    return element("details", element("summary", summary), *content, open=opened)


def measured(shown: str, stderr: float | None) -> Markup:
    """A number, and beneath it its standard error where there is one."""
    if stderr is None or shown == DASH:
        return joined(shown)
    return joined(shown, " ", element("small", f"\u00b1 {significant(stderr, 1)}"))


def measured_share(value: float | None, stderr: float | None) -> Markup:
    """The same of a share, in per cent."""
    return measured(share(value), None if stderr is None else stderr * 100)


def described(pairs: Sequence[tuple[str, Child]]) -> Markup:
    """Terms and what they are."""
    return element("dl", [element("div", element("dt", term), element("dd", said)) for term, said in pairs])


def _head(column: Column) -> Markup:
    note = joined(" ", element("small", column.note)) if column.note else None
    return element("th", column.name, note, scope="col", class_=column.kind)


def _row(line: Line, columns: Sequence[Column]) -> Markup:
    cells = zip(line.cells, columns, strict=True)
    return element(
        "tr", [_cell(cell, column, not place) for place, (cell, column) in enumerate(cells)], class_=line.kind
    )


def _cell(given: Cell | Child, column: Column, head: bool) -> Markup:
    cell = given if isinstance(given, Cell) else Cell(given)
    kinds = " ".join(kind for kind in (column.kind, cell.kind) if kind) or None
    value = None if cell.value is None else repr(float(cell.value))
    if head:
        return element("th", cell.content, scope="row", class_=kinds, data_value=value)
    return element("td", cell.content, class_=kinds, data_value=value)
