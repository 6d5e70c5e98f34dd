"""Size against drift as a drawing: points by verdict or series, the front as stairs, names where they cover nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from qlora_export.drift.gate import Z_95
from qlora_export.report.html.chart import (
    Chart,
    Circle,
    Corners,
    Frame,
    Line,
    Path,
    Plane,
    Shape,
    Words,
    around_point,
    level_axis,
    limit_line,
    mark,
    path,
    value_axis,
)
from qlora_export.report.html.figures import significant
from qlora_export.report.html.scale import around
from qlora_export.report.html.visible import clipped, visible
from qlora_export.report.label_places import Box, place_labels

FRAME = Frame(1180.0, 500.0, 62.0, 1168.0, 40.0, 452.0)
LETTER_WIDTH, LABEL_HEIGHT = 7.3, 15.0
LONGEST_LABEL = 32
MARK = 7.0
CROSS = ((-5, -5), (5, 5), (0, 0), (5, -5), (-5, 5))
DIAMOND = ((0, -6), (6, 0), (0, 6), (-6, 0), (0, -6))


@dataclass(frozen=True)
class Point:
    """An artifact in the drawing: megabytes, nats a token and their error, its verdict, whether it is on the front.

    It gets the mark of its series where it has one, else that of its verdict; the note follows its name.
    """

    name: str
    size: float
    drift: float
    stderr: float
    outcome: str
    leads: bool
    series: int | None = None
    note: str = ""


def scatter(points: Sequence[Point], limit: float | None, frame: Frame = FRAME) -> Chart:
    """The drawing; `limit` is that of mean KL where all artifacts have the same."""
    plane = _plane(points, limit, frame)
    corners = _stairs(plane, points)
    leading = ", ".join(point.name for point in points if point.leads)
    shapes = [
        *level_axis(plane, "mean KL, nats a token"),
        *value_axis(plane, "size of the folder, MB", ticks=8, tick="grid"),
        *(limit_line(plane, limit, f"limit {significant(limit)}") if limit else ()),
        *path(corners, "front"),
        *(_error_bar(plane, point) for point in points if point.stderr),
        *(_mark(plane, point) for point in points),
        *_labels(plane, points, corners, limit),
    ]
    description = (
        f"Mean KL against size of {len(points)} artifacts, both logarithmic. No smaller one drifts less than {leading}."
        " A table below has the numbers."
    )
    return Chart("size-and-drift", "Drift against size", description, plane, shapes)


def _plane(points: Sequence[Point], limit: float | None, frame: Frame) -> Plane:
    sizes, drifts = [point.size for point in points], [point.drift for point in points]
    return frame.plane(around(sizes, 1.3), around([*drifts, *([limit] if limit else [])], 2.2), (True, True))


def _place(plane: Plane, point: Point) -> tuple[float, float]:
    return plane.across.place(point.size), plane.up.place(point.drift)


def _stairs(plane: Plane, points: Sequence[Point]) -> Corners:
    """Corners of the front: right at the drift of one point, down at the size of the next."""
    corners, height = list[tuple[float, float]](), plane.top
    for point in sorted((point for point in points if point.leads), key=lambda point: point.size):
        x, y = _place(plane, point)
        corners += [(x, height), (x, y)]
        height = y
    return [*corners, (plane.right, height)] if corners else []


def _error_bar(plane: Plane, point: Point) -> Line:
    reach = Z_95 * point.stderr
    x, high = plane.across.place(point.size), plane.up.place(point.drift + reach)
    low = plane.up.place(max(point.drift - reach, plane.up.low))
    return Line(x, low, x, high, f"error {point.outcome if point.series is None else f'series-{point.series}'}")


def _mark(plane: Plane, point: Point) -> Shape:
    x, y = _place(plane, point)
    said = f"{point.name}: {significant(point.size)} MB, mean KL {significant(point.drift, 2)}, {point.outcome}"
    if point.series is not None:
        return mark(x, y, point.series, said, point.outcome)
    if point.outcome == "pass":
        return Circle(x, y, 5.5, "point pass", said)
    corners = CROSS if point.outcome == "fail" else DIAMOND
    return Path(around_point(x, y, corners), f"point {point.outcome}", said=said)


def _labels(plane: Plane, points: Sequence[Point], corners: Corners, limit: float | None) -> list[Shape]:
    """Names, and thin lines to them where they lie apart."""
    anchors = [_place(plane, point) for point in points]
    names = [clipped(point.name, LONGEST_LABEL) + point.note for point in points]
    sizes = [(len(visible(name)) * LETTER_WIDTH, LABEL_HEIGHT) for name in names]
    taken = [Box(x - MARK, y - MARK, 2 * MARK, 2 * MARK) for x, y in anchors]
    taken += [_along(start, end) for start, end in pairwise(corners)]
    if limit:
        height = plane.up.place(limit)
        taken += [Box(plane.right - 80, height - 18, 80, 20), Box(plane.left, height - 2, plane.right - plane.left, 4)]
    inside = Box(plane.left, plane.top, plane.right - plane.left, plane.bottom - plane.top)
    boxes = place_labels(anchors, sizes, inside, taken, 1.0)
    leaders = [line for anchor, box in zip(anchors, boxes, strict=True) for line in _leader(anchor, box)]
    kinds = ["point-name leads" if point.leads else "point-name" for point in points]
    return leaders + [
        Words(box.left, box.bottom + LABEL_HEIGHT - 4, name, "start", kind)
        for kind, name, box in zip(kinds, names, boxes, strict=True)
    ]


def _along(start: tuple[float, float], end: tuple[float, float]) -> Box:
    """A thin box along an upright or level line."""
    (x, y), (other_x, other_y) = start, end
    return Box(min(x, other_x) - 2, min(y, other_y) - 2, abs(x - other_x) + 4, abs(y - other_y) + 4)


def _leader(anchor: tuple[float, float], box: Box) -> list[Shape]:
    x, y = anchor
    near_x = min(max(x, box.left), box.left + box.width)
    near_y = min(max(y, box.bottom), box.bottom + box.height)
    return [Line(x, y, near_x, near_y, "leader")] if abs(near_x - x) + abs(near_y - y) > 16 else []
