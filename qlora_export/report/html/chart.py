"""What all charts share: a plane with axes, a title and a description for those who cannot see it, marks of series.

Colours are classes of the style sheet, so that they follow the reader's choice of light or dark; every series has a
shape of its own besides.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_export.report.html.elements import Child, Markup, element, joined, short
from qlora_export.report.html.scale import Scale, tick_text

SERIES = 8
BROAD = 800.0


@dataclass(frozen=True)
class Plane:
    """The area of a chart between its axes."""

    width: float
    height: float
    across: Scale
    up: Scale

    @property
    def left(self) -> float:
        """The pixel of the left edge."""
        return self.across.start

    @property
    def right(self) -> float:
        """The pixel of the right edge."""
        return self.across.end

    @property
    def top(self) -> float:
        """The pixel of the upper edge."""
        return self.up.end

    @property
    def bottom(self) -> float:
        """The pixel of the lower edge."""
        return self.up.start


def chart(place: str, title: str, description: str, plane: Plane, *shapes: Child) -> Markup:
    """A drawing with its words; `place` makes their ids."""
    drawing = element(
        "svg",
        element("title", title, id=f"{place}-title"),
        element("desc", description, id=f"{place}-description"),
        *shapes,
        viewBox=f"0 0 {short(plane.width)} {short(plane.height)}",
        width=plane.width,
        height=plane.height,
        class_="broad" if plane.width > BROAD else None,
        role="img",
        aria_labelledby=f"{place}-title {place}-description",
    )
    return element("div", drawing, class_="scroll chart", role="group", tabindex="0", aria_label=f"Chart: {title}")


def words(x: float, y: float, said: str, anchor: str = "middle", kind: str | None = None) -> Markup:
    """Words in a chart."""
    return element("text", said, x=x, y=y, text_anchor=anchor, class_=kind)


def line(x: float, y: float, other_x: float, other_y: float, kind: str) -> Markup:
    """A straight line."""
    return element("line", x1=x, y1=y, x2=other_x, y2=other_y, class_=kind)


def level_axis(plane: Plane, name: str, ticks: int = 6) -> Markup:
    """The axis to the left: lines across at round values, and its name above."""
    shapes = []
    for value in plane.up.ticks(ticks):
        y = plane.up.place(value)
        shapes += [line(plane.left, y, plane.right, y, "grid"), words(plane.left - 8, y + 4, tick_text(value), "end")]
    return joined(shapes, words(4, plane.top - 12, name, "start", "axis-name"))


def value_axis(plane: Plane, name: str, ticks: int = 7, grid: bool = False) -> Markup:
    """The axis below: its line, ticks at round values, and its name."""
    shapes = [line(plane.left, plane.bottom, plane.right, plane.bottom, "axis")]
    for value in plane.across.ticks(ticks):
        x = plane.across.place(value)
        top = plane.top if grid else plane.bottom
        shapes += [
            line(x, top, x, plane.bottom, "grid") if grid else line(x, plane.bottom, x, plane.bottom + 4, "axis"),
            words(x, plane.bottom + 18, tick_text(value)),
        ]
    return joined(shapes, axis_name(plane, name))


def axis_name(plane: Plane, name: str) -> Markup:
    """The name of the axis below, at its right end."""
    return words(plane.right, plane.bottom + 36, name, "end", "axis-name")


def limit_line(plane: Plane, value: float, said: str) -> Markup:
    """A level that must not be crossed."""
    y = plane.up.place(value)
    drawn = line(plane.left, y, plane.right, y, "limit")
    return joined(drawn, words(plane.right, y - 5, said, "end", "limit-name"))


def path(points: list[tuple[float, float]], kind: str) -> Markup | None:
    """A line through points; None for fewer than two."""
    if len(points) < 2:
        return None
    return element("path", d="M" + "L".join(f"{short(x)} {short(y)}" for x, y in points), class_=kind)


def mark(x: float, y: float, series: int, said: str, kind: str = "") -> Markup:
    """A point in the colour and shape of its series, which says what it is when pointed at."""
    shape = SHAPES[series % len(SHAPES)]
    drawn = "M" + "L".join(f"{short(x + across)} {short(y + up)}" for across, up in shape) + "Z"
    classes = f"mark series-{series % SERIES} {kind}".strip()
    if not shape:
        return element("circle", element("title", said) if said else None, cx=x, cy=y, r=4, class_=classes)
    return element("path", element("title", said) if said else None, d=drawn, class_=classes)


def legend(names: list[str]) -> Markup:
    """The series of a chart by mark and name."""
    items = [element("li", _swatch(number), element("code", name)) for number, name in enumerate(names)]
    return element("ul", items, class_="legend")


def _swatch(series: int) -> Markup:
    return element("svg", mark(7.0, 7.0, series, ""), width=14, height=14, viewBox="0 0 14 14", aria_hidden="true")


# Corners around the point; none is a circle.
SHAPES: tuple[tuple[tuple[float, float], ...], ...] = (
    (),
    ((-3.6, -3.6), (3.6, -3.6), (3.6, 3.6), (-3.6, 3.6)),
    ((0, -4.8), (4.6, 3.4), (-4.6, 3.4)),
    ((0, -5), (5, 0), (0, 5), (-5, 0)),
    ((0, 4.8), (4.6, -3.4), (-4.6, -3.4)),
    ((-1.5, -5), (1.5, -5), (1.5, -1.5), (5, -1.5), (5, 1.5), (1.5, 1.5), (1.5, 5), (-1.5, 5), (-1.5, 1.5), (-5, 1.5),
     (-5, -1.5), (-1.5, -1.5)),
    ((-5, -2.2), (5, -2.2), (5, 2.2), (-5, 2.2)),
    ((-2.2, -5), (2.2, -5), (2.2, 5), (-2.2, 5)),
)  # fmt: skip
