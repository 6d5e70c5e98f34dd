"""What all charts share: a plane with axes, and the shapes in it, as geometry that a page or a file can draw.

Colours are the drawer's, by the `kind` of a shape (in a page the classes of its style sheet); every series has a shape
of its own besides. Places are pixels, to the right and down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from qlora_export.report.html.figures import short
from qlora_export.report.html.scale import Scale, tick_text

SERIES = 8
BROAD = 800.0
Ends: TypeAlias = tuple[float, float]
Corners: TypeAlias = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A straight line between two points."""

    x: float
    y: float
    other_x: float
    other_y: float
    kind: str
    tag: ClassVar[str] = "line"


@dataclass(frozen=True)
class Words:
    """Words that start, end or have their middle at a point of their base line."""

    x: float
    y: float
    said: str
    anchor: str = "middle"
    kind: str = ""
    tag: ClassVar[str] = "text"


@dataclass(frozen=True)
class Path:
    """Straight lines from corner to corner; `said` is told when it is pointed at."""

    corners: Corners
    kind: str
    closed: bool = False
    said: str = ""
    tag: ClassVar[str] = "path"

    @property
    def data(self) -> str:
        """The path in the words of SVG."""
        return "M" + "L".join(f"{short(x)} {short(y)}" for x, y in self.corners) + ("Z" if self.closed else "")


@dataclass(frozen=True)
class Circle:
    """A circle; `said` is told when it is pointed at."""

    x: float
    y: float
    radius: float
    kind: str
    said: str = ""
    tag: ClassVar[str] = "circle"


@dataclass(frozen=True)
class Bar:
    """A rectangle by its left upper corner; `said` is told when it is pointed at."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    said: str
    tag: ClassVar[str] = "rect"


Shape: TypeAlias = Line | Words | Path | Circle | Bar


@dataclass(frozen=True)
class Plane:
    """The area of a chart between its axes, and the size of the whole."""

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


@dataclass(frozen=True)
class Frame:
    """The size of a chart, and the pixels of the edges of its plane."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float

    def plane(self, across: Ends, up: Ends, logarithmic: tuple[bool, bool] = (False, False)) -> Plane:
        """The plane between these ends of its axes."""
        level = Scale(*across, self.left, self.right, logarithmic[0])
        return Plane(self.width, self.height, level, Scale(*up, self.bottom, self.top, logarithmic[1]))


@dataclass(frozen=True)
class Chart:
    """A drawing, with a title and a description for those who cannot see it; `place` makes their ids."""

    place: str
    title: str
    description: str
    plane: Plane
    shapes: Sequence[Shape]

    @property
    def broad(self) -> bool:
        """Whether it needs the width of a page."""
        return self.plane.width > BROAD


def level_axis(plane: Plane, name: str, ticks: int = 6) -> list[Shape]:
    """The axis to the left: lines across at round values, and its name above."""
    drawn: list[Shape] = []
    for value in plane.up.ticks(ticks):
        y = plane.up.place(value)
        drawn += [Line(plane.left, y, plane.right, y, "grid"), Words(plane.left - 8, y + 4, tick_text(value), "end")]
    return [*drawn, Words(4, plane.top - 12, name, "start", "axis-name")]


def value_axis(plane: Plane, name: str, ticks: int = 7, tick: str = "axis") -> list[Shape]:
    """The axis below with round values; a `tick` is short, or a line of the `grid` up to the upper edge."""
    return axis_below(plane, name, [(value, tick_text(value)) for value in plane.across.ticks(ticks)], tick)


def axis_below(plane: Plane, name: str, named: Sequence[tuple[float, str]], tick: str = "") -> list[Shape]:
    """The axis below with these values and their words, without marks where `tick` is empty."""
    drawn: list[Shape] = [Line(plane.left, plane.bottom, plane.right, plane.bottom, "axis")]
    start, end = (plane.top, plane.bottom) if tick == "grid" else (plane.bottom, plane.bottom + 4)
    for value, said in named:
        x = plane.across.place(value)
        drawn += [Line(x, start, x, end, tick)] if tick else []
        drawn.append(Words(x, plane.bottom + 18, said))
    return [*drawn, Words(plane.right, plane.bottom + 36, name, "end", "axis-name")]


def limit_line(plane: Plane, value: float, said: str) -> list[Shape]:
    """A level that must not be crossed."""
    y = plane.up.place(value)
    return [Line(plane.left, y, plane.right, y, "limit"), Words(plane.right, y - 5, said, "end", "limit-name")]


def path(corners: Corners, kind: str) -> list[Shape]:
    """A line through points; nothing for fewer than two."""
    return [Path(corners, kind)] if len(corners) > 1 else []


def mark(x: float, y: float, series: int, said: str = "", kind: str = "") -> Shape:
    """A point in the colour and shape of its series, which says what it is when pointed at."""
    corners = SHAPES[series % len(SHAPES)]
    classes = f"mark series-{series % SERIES} {kind}".strip()
    return Path(around_point(x, y, corners), classes, True, said) if corners else Circle(x, y, 4, classes, said)


def around_point(x: float, y: float, corners: Corners) -> Corners:
    """Corners that are given from a point."""
    return [(x + across, y + up) for across, up in corners]


# Corners around the point; none is a circle.
SHAPES: tuple[Corners, ...] = (
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
