"""What every layer kept of the adapter's change: charts over the layers, and the numbers of every matrix."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qlora_export.report.html.chart import (
    SERIES,
    Plane,
    axis_name,
    chart,
    legend,
    level_axis,
    limit_line,
    line,
    mark,
    path,
    words,
)
from qlora_export.report.html.elements import Markup, code, element, joined
from qlora_export.report.html.figures import count, counted, share
from qlora_export.report.html.reading import Facts, artifacts, number, part, parts, text
from qlora_export.report.html.scale import Scale
from qlora_export.report.html.section import Section, artifact_heading, name_of
from qlora_export.report.html.table import Cell, Column, folded, table

WIDTH, HEIGHT = 560.0, 260.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 548.0, 34.0, 214.0
FLOORS = (0.9, 0.8, 0.5, 0.0)
# A chart of layers that all kept this much would be a straight line.
EVEN = (0.99, 1.01)
# A mixture of experts has tens of thousands of matrices: more than these are for report.json.
MOST_ROWS, MOST_MARKS = 1000, 2000
LAYER = re.compile(r"(?:^|\.)([0-9]{1,6})\.")
PLACES = {"survival": "in the weights", "weighted_survival": "in the layers' outputs"}


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
    heading = "Survival by layer"
    if not found:
        return Section(
            "layers", heading, "No artifact has weights that an adapter's change could be read from.", joined()
        )
    kinds = sorted({spot.kind for _, artifact in found for key in PLACES for spot in _spots(artifact, key)})
    drawn = [(place, artifact, key) for place, artifact in found for key in PLACES if _uneven(_spots(artifact, key))]
    figures = [_figure(place, artifact, key, kinds) for place, artifact, key in drawn]
    lead = "The share of the adapter's change that is left in every matrix. 100% is all of it."
    body = joined(
        legend(kinds) if figures else None,
        element("div", figures, class_="figures") if figures else None,
        _even_ones([artifact for place, artifact in found if (place, artifact, "survival") not in drawn]),
        [folded(joined(code(name_of(artifact)), ", every matrix"), _table(artifact)) for _, artifact in found],
    )
    return Section("layers", heading, lead, body)


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


def _uneven(spots: list[Spot]) -> bool:
    return any(not EVEN[0] <= spot.kept <= EVEN[1] for spot in spots)


def _even_ones(even: list[Facts]) -> Markup | None:
    if not even:
        return None
    names = [joined(", " if place else None, code(name_of(artifact))) for place, artifact in enumerate(even)]
    said = (
        f" {'keeps' if len(even) == 1 else 'keep'} {EVEN[0]:.0%} to {EVEN[1]:.0%} of it in the weights of every matrix."
    )
    return element("p", names, said)


def _figure(place: int, artifact: Facts, key: str, kinds: list[str]) -> Markup:
    drawing = _chart(f"layers-{place}-{key}", artifact, key, kinds)
    return element("figure", element("figcaption", artifact_heading(artifact, PLACES[key])), drawing)


def _chart(place: str, artifact: Facts, key: str, kinds: list[str]) -> Markup:
    spots = _spots(artifact, key)
    plane = _plane(spots)
    lowest = min(spots, key=lambda spot: spot.kept)
    limit = number(part(artifact, "limits"), "survival_min")
    shown = spots if len(spots) <= MOST_MARKS else _lowest(spots)
    drawn = [_series(plane, [spot for spot in shown if spot.kind == kind], kinds.index(kind)) for kind in kinds]
    return chart(
        place,
        f"Survival {PLACES[key]}, {name_of(artifact)}",
        f"{counted(len(spots), 'matrix').replace('matrixs', 'matrices')}; the lowest is {lowest.tensor} "
        f"with {share(lowest.kept)}. A table below has all.",
        plane,
        level_axis(plane, "% left", 5),
        _layer_axis(plane, spots),
        line(plane.left, plane.up.place(100), plane.right, plane.up.place(100), "whole"),
        drawn,
        limit_line(plane, limit * 100, f"limit {share(limit, 0)}") if limit and limit * 100 > plane.up.low else None,
    )


def _lowest(spots: list[Spot]) -> list[Spot]:
    """Of every kind in every layer the matrix that kept least."""
    found: dict[tuple[str, int | None], Spot] = {}
    for spot in spots:
        place = (spot.kind, spot.layer)
        if place not in found or spot.kept < found[place].kept:
            found[place] = spot
    return list(found.values())


def _plane(spots: list[Spot]) -> Plane:
    kept = [spot.kept for spot in spots]
    floor = next((floor for floor in FLOORS if floor <= min(kept) - 0.02), min(kept) - 0.05)
    ceiling = max(1.02, max(kept) + 0.02)
    places = [_across(spot, spots) for spot in spots]
    across = Scale(min(places) - 0.5, max(places) + 0.5, LEFT, RIGHT)
    return Plane(WIDTH, HEIGHT, across, Scale(floor * 100, ceiling * 100, BOTTOM, TOP))


def _across(spot: Spot, spots: list[Spot]) -> float:
    """The layer's number; what is in no layer comes last."""
    if spot.layer is not None:
        return float(spot.layer)
    return max((other.layer for other in spots if other.layer is not None), default=-1) + 1.0


def _layer_axis(plane: Plane, spots: list[Spot]) -> Markup:
    numbered = {float(spot.layer) for spot in spots if spot.layer is not None}
    ticks = [value for value in plane.across.ticks(9) if value in numbered]
    named = [words(plane.across.place(value), plane.bottom + 18, f"{value:.0f}") for value in ticks]
    outside = next((spot for spot in spots if spot.layer is None), None)
    if outside is not None:
        named.append(words(plane.across.place(_across(outside, spots)), plane.bottom + 18, "none"))
    axis = line(plane.left, plane.bottom, plane.right, plane.bottom, "axis")
    return joined(axis, named, axis_name(plane, "layer"))


def _series(plane: Plane, spots: list[Spot], series: int) -> Markup:
    """The points of one kind of matrix, and a line through the lowest of every layer."""
    lowest = sorted((spot.layer, spot.kept) for spot in _lowest(spots) if spot.layer is not None)
    corners = [(plane.across.place(layer), plane.up.place(100 * kept)) for layer, kept in lowest]
    marks = [mark(_pixel(plane, spot), plane.up.place(100 * spot.kept), series, _said(spot)) for spot in spots]
    return joined(path(corners, f"series-line series-{series % SERIES}"), marks)


def _pixel(plane: Plane, spot: Spot) -> float:
    """Where a matrix is across: at its layer, or at the end where it is in none."""
    return plane.across.place(plane.across.high - 0.5 if spot.layer is None else spot.layer)


def _said(spot: Spot) -> str:
    return f"{spot.tensor}: {share(spot.kept)}"


def _table(artifact: Facts) -> Markup:
    columns = (
        Column("matrix"),
        Column("survival", numeric=True),
        Column("codes changed", numeric=True),
        Column("survival in outputs", numeric=True),
        Column("output error", numeric=True),
    )
    found, name = parts(artifact, "layers"), name_of(artifact)
    caption = f"What every matrix of {name} kept"
    if len(found) > MOST_ROWS:
        caption = f"The {count(MOST_ROWS)} of {count(len(found))} matrices of {name} that kept least"
        found = sorted(found, key=lambda layer: number(layer, "survival") or 0.0)[:MOST_ROWS]
    drawn = table(caption, columns, [_row(layer) for layer in found], sortable=True)
    if not any(text(layer, "weighted_of") == "before tuning" for layer in found):
        return drawn
    return joined(drawn, element("p", "* of the weights before they were tuned; those are not shipped.", class_="said"))


def _row(layer: Facts) -> list[Cell | Markup]:
    before = "*" if text(layer, "weighted_of") == "before tuning" else ""
    cells = []
    for key, places in (("survival", 1), ("codes_changed", 2), ("weighted_survival", 1), ("output_error", 2)):
        value = number(layer, key)
        noted = before if value is not None and key in ("weighted_survival", "output_error") else ""
        cells.append(Cell(share(value, places) + noted, value))
    return [code(text(layer, "tensor")), *cells]
