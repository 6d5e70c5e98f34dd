"""Size against drift as a drawing: points by verdict, the front as stairs, names where they cover nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from qlora_export.report.html.chart import Plane, chart, level_axis, limit_line, line, path, value_axis, words
from qlora_export.report.html.elements import Markup, element, joined, short
from qlora_export.report.html.figures import significant
from qlora_export.report.html.scale import Scale, around
from qlora_export.report.html.visible import clipped, visible
from qlora_export.report.label_places import Box, place_labels

WIDTH, HEIGHT = 1180.0, 500.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 1168.0, 40.0, 452.0
LETTER_WIDTH, LABEL_HEIGHT = 7.3, 15.0
LONGEST_LABEL = 32
MARK = 7.0


@dataclass(frozen=True)
class Point:
    """An artifact in the drawing: megabytes, nats a token and their error, its verdict, whether it is on the front."""

    name: str
    size: float
    drift: float
    stderr: float
    outcome: str
    leads: bool


def scatter(points: Sequence[Point], limit: float | None) -> Markup:
    """The drawing; `limit` is that of mean KL where all artifacts have the same."""
    plane = _plane(points, limit)
    corners = _stairs(plane, points)
    leading = ", ".join(point.name for point in points if point.leads)
    return chart(
        "size-and-drift",
        "Drift against size",
        f"Mean KL against size of {len(points)} artifacts, both logarithmic. No smaller one drifts less than {leading}."
        " A table below has the numbers.",
        plane,
        level_axis(plane, "mean KL, nats a token"),
        value_axis(plane, "size of the folder, MB", ticks=8, grid=True),
        limit_line(plane, limit, f"limit {significant(limit)}") if limit else None,
        path(corners, "front"),
        [_error_bar(plane, point) for point in points],
        [_mark(plane, point) for point in points],
        _labels(plane, points, corners, limit),
    )


def _plane(points: Sequence[Point], limit: float | None) -> Plane:
    sizes, drifts = [point.size for point in points], [point.drift for point in points]
    low, high = around([*drifts, *([limit] if limit else [])], 2.2)
    left, right = around(sizes, 1.3)
    return Plane(WIDTH, HEIGHT, Scale(left, right, LEFT, RIGHT, True), Scale(low, high, BOTTOM, TOP, True))


def _place(plane: Plane, point: Point) -> tuple[float, float]:
    return plane.across.place(point.size), plane.up.place(point.drift)


def _stairs(plane: Plane, points: Sequence[Point]) -> list[tuple[float, float]]:
    """Corners of the front: right at the drift of one point, down at the size of the next."""
    corners, height = list[tuple[float, float]](), plane.top
    for point in sorted((point for point in points if point.leads), key=lambda point: point.size):
        x, y = _place(plane, point)
        corners += [(x, height), (x, y)]
        height = y
    return [*corners, (plane.right, height)] if corners else []


def _error_bar(plane: Plane, point: Point) -> Markup | None:
    if not point.stderr:
        return None
    reach = 1.96 * point.stderr
    x, high = plane.across.place(point.size), plane.up.place(point.drift + reach)
    return line(x, plane.up.place(max(point.drift - reach, plane.up.low)), x, high, f"error {point.outcome}")


def _mark(plane: Plane, point: Point) -> Markup:
    x, y = _place(plane, point)
    said = f"{point.name}: {significant(point.size)} MB, mean KL {significant(point.drift, 2)}, {point.outcome}"
    kind = f"point {point.outcome}"
    named = element("title", said)
    if point.outcome == "pass":
        return element("circle", named, cx=x, cy=y, r=5.5, class_=kind)
    if point.outcome == "fail":
        corners = ((-5, -5), (5, 5), (0, 0), (5, -5), (-5, 5))
    else:
        corners = ((0, -6), (6, 0), (0, 6), (-6, 0), (0, -6))
    drawn = "M" + "L".join(f"{short(x + across)} {short(y + up)}" for across, up in corners)
    return element("path", named, d=drawn, class_=kind)


def _labels(
    plane: Plane, points: Sequence[Point], corners: Sequence[tuple[float, float]], limit: float | None
) -> Markup:
    """Names, and thin lines to them where they lie apart."""
    anchors = [_place(plane, point) for point in points]
    names = [clipped(point.name, LONGEST_LABEL) for point in points]
    sizes = [(len(visible(name)) * LETTER_WIDTH, LABEL_HEIGHT) for name in names]
    taken = [Box(x - MARK, y - MARK, 2 * MARK, 2 * MARK) for x, y in anchors]
    taken += [_along(start, end) for start, end in pairwise(corners)]
    if limit:
        height = plane.up.place(limit)
        taken += [Box(plane.right - 80, height - 18, 80, 20), Box(plane.left, height - 2, plane.right - plane.left, 4)]
    inside = Box(plane.left, plane.top, plane.right - plane.left, plane.bottom - plane.top)
    boxes = place_labels(anchors, sizes, inside, taken, 1.0)
    return joined(
        [_leader(anchor, box) for anchor, box in zip(anchors, boxes, strict=True)],
        [
            words(
                box.left,
                box.bottom + LABEL_HEIGHT - 4,
                name,
                "start",
                "point-name leads" if point.leads else "point-name",
            )
            for point, name, box in zip(points, names, boxes, strict=True)
        ],
    )


def _along(start: tuple[float, float], end: tuple[float, float]) -> Box:
    """A thin box along an upright or level line."""
    (x, y), (other_x, other_y) = start, end
    return Box(min(x, other_x) - 2, min(y, other_y) - 2, abs(x - other_x) + 4, abs(y - other_y) + 4)


def _leader(anchor: tuple[float, float], box: Box) -> Markup | None:
    x, y = anchor
    near_x = min(max(x, box.left), box.left + box.width)
    near_y = min(max(y, box.bottom), box.bottom + box.height)
    if abs(near_x - x) + abs(near_y - y) <= 16:
        return None
    return line(x, y, near_x, near_y, "leader")
