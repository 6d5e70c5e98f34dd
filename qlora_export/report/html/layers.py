"""What every layer kept of the adapter's change: charts over the layers, and the numbers of every matrix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_export.report.html.chart import (
    SERIES,
    Chart,
    Frame,
    Line,
    Plane,
    Shape,
    axis_below,
    level_axis,
    limit_line,
    mark,
    path,
)
from qlora_export.report.html.figures import count, counted, share
from qlora_export.report.html.reading import Facts, artifacts, number, part, parts, text
from qlora_export.report.html.section import Section, name_of

FRAME = Frame(560.0, 260.0, 46.0, 548.0, 34.0, 214.0)
FLOORS = (0.9, 0.8, 0.5, 0.0)
# A chart of layers that all kept this much would be a straight line.
EVEN = (0.99, 1.01)
# A mixture of experts has tens of thousands of matrices: more than these are for report.json.
MOST_ROWS, MOST_MARKS = 1000, 2000
LAYER = re.compile(r"(?:^|\.)([0-9]{1,6})\.")
PLACES = {"survival": "in the weights", "weighted_survival": "in the layers' outputs"}
LEAD = "The share of the adapter's change that is left in every matrix. 100% is all of it."
NONE = "No artifact has weights that an adapter's change could be read from."


@dataclass(frozen=True)
class Spot:
    """One matrix in a chart: its layer, None outside of all; which kind of matrix; what it kept."""

    tensor: str
    layer: int | None
    kind: str
    kept: float


def layers(report: Facts) -> Section:
    """The section; it says so where no weights could be read back."""
    found = [(place, artifact) for place, artifact in enumerate(artifacts(report), 1) if parts(artifact, "layers")]
    spots = [(place, artifact, key, _spots(artifact, key)) for place, artifact in found for key in PLACES]
    kinds = sorted({spot.kind for *_, mine in spots for spot in mine})
    drawn = [item for item in spots if any(not EVEN[0] <= spot.kept <= EVEN[1] for spot in item[3])]
    uneven = {place for place, _, key, _ in drawn if key == "survival"}
    facts = {
        "legend": [(mark(7.0, 7.0, series), kind) for series, kind in enumerate(kinds)],
        "figures": [
            (artifact, PLACES[key], _chart(f"layers-{place}-{key}", artifact, key, mine, kinds))
            for place, artifact, key, mine in drawn
        ],
        "even": [artifact for place, artifact in found if place not in uneven],
        "ends": " to ".join(f"{end:.0%}" for end in EVEN),
        "tables": [(artifact, *_rows(artifact)) for _, artifact in found],
    }
    return Section("layers", "Survival by layer", LEAD if found else NONE, "layers.html", facts)


def _spots(artifact: Facts, key: str) -> list[Spot]:
    found = []
    for layer in parts(artifact, "layers"):
        tensor, kept = text(layer, "tensor"), number(layer, key)
        if kept is not None:
            where = LAYER.search(tensor)
            found.append(Spot(tensor, int(where[1]) if where else None, _kind(tensor), kept))
    return found


def _kind(tensor: str) -> str:
    """The matrix's name within its layer: q_proj, down_proj."""
    names = [name for name in tensor.removesuffix(".weight").split(".") if not name.isdecimal()]
    return ".".join(names[-2:]) if "experts" in names[-2:-1] else names[-1] if names else tensor


def _chart(place: str, artifact: Facts, key: str, spots: Sequence[Spot], kinds: list[str]) -> Chart:
    plane = _plane(spots)
    lowest = min(spots, key=lambda spot: spot.kept)
    limit = number(part(artifact, "limits"), "survival_min")
    shown = spots if len(spots) <= MOST_MARKS else _lowest(spots)
    whole = plane.up.place(100)
    shapes = [
        *level_axis(plane, "% left", 5),
        *axis_below(plane, "layer", _named_layers(plane, spots)),
        Line(plane.left, whole, plane.right, whole, "whole"),
        *(
            shape
            for series, kind in enumerate(kinds)
            for shape in _series(plane, [spot for spot in shown if spot.kind == kind], series)
        ),
        *(limit_line(plane, limit * 100, f"limit {share(limit, 0)}") if limit and limit * 100 > plane.up.low else ()),
    ]
    description = (
        f"{counted(len(spots), 'matrix').replace('matrixs', 'matrices')}; the lowest is {lowest.tensor} "
        f"with {share(lowest.kept)}. A table below has all."
    )
    return Chart(place, f"Survival {PLACES[key]}, {name_of(artifact)}", description, plane, shapes)


def _lowest(spots: Sequence[Spot]) -> list[Spot]:
    """Of every kind in every layer the matrix that kept least."""
    found: dict[tuple[str, int | None], Spot] = {}
    for spot in spots:
        place = (spot.kind, spot.layer)
        if place not in found or spot.kept < found[place].kept:
            found[place] = spot
    return list(found.values())


def _plane(spots: Sequence[Spot]) -> Plane:
    """Layers by their number, with room at the right end for what is in no layer."""
    kept = [spot.kept for spot in spots]
    floor = next((floor for floor in FLOORS if floor <= min(kept) - 0.02), min(kept) - 0.05)
    ceiling = max(1.02, max(kept) + 0.02)
    numbered = [spot.layer for spot in spots if spot.layer is not None]
    places = numbered if len(numbered) == len(spots) else [*numbered, max(numbered, default=-1) + 1]
    return FRAME.plane((min(places) - 0.5, max(places) + 0.5), (floor * 100, ceiling * 100))


def _across(plane: Plane, spot: Spot) -> float:
    """The layer's number; what is in no layer comes last."""
    return plane.across.high - 0.5 if spot.layer is None else spot.layer


def _named_layers(plane: Plane, spots: Sequence[Spot]) -> list[tuple[float, str]]:
    numbered = {spot.layer for spot in spots if spot.layer is not None}
    named = [(value, f"{value:.0f}") for value in plane.across.ticks(9) if value in numbered]
    outside = next((spot for spot in spots if spot.layer is None), None)
    return [*named, (_across(plane, outside), "none")] if outside else named


def _series(plane: Plane, spots: Sequence[Spot], series: int) -> list[Shape]:
    """The points of one kind of matrix, and a line through the lowest of every layer."""
    lowest = sorted((spot.layer, spot.kept) for spot in _lowest(spots) if spot.layer is not None)
    corners = [(plane.across.place(layer), plane.up.place(100 * kept)) for layer, kept in lowest]
    marks = (_mark(plane, spot, series) for spot in spots)
    return [*path(corners, f"series-line series-{series % SERIES}"), *marks]


def _mark(plane: Plane, spot: Spot, series: int) -> Shape:
    x, y = plane.across.place(_across(plane, spot)), plane.up.place(100 * spot.kept)
    return mark(x, y, series, f"{spot.tensor}: {share(spot.kept)}")


def _rows(artifact: Facts) -> tuple[str, list[Facts], bool]:
    """A table's caption, its rows, and whether one of them tells of weights before they were tuned."""
    found, name = parts(artifact, "layers"), name_of(artifact)
    caption = f"What every matrix of {name} kept"
    if len(found) > MOST_ROWS:
        caption = f"The {count(MOST_ROWS)} of {count(len(found))} matrices of {name} that kept least"
        found = sorted(found, key=lambda layer: number(layer, "survival") or 0.0)[:MOST_ROWS]
    return caption, found, any(text(layer, "weighted_of") == "before tuning" for layer in found)
