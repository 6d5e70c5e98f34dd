"""How far every layer is from the reference's on the same inputs, in the order they run, and the one that broke."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_export.report.html.chart import (
    Chart,
    Circle,
    Frame,
    Plane,
    Shape,
    Words,
    axis_below,
    level_axis,
    mark,
    path,
)
from qlora_export.report.html.figures import counted, significant
from qlora_export.report.html.reading import Facts, artifacts_with, number, part, parts, text
from qlora_export.report.html.scale import around
from qlora_export.report.html.section import Section, name_of

FRAME = Frame(560.0, 260.0, 68.0, 548.0, 34.0, 214.0)
LEAD = "How far each layer is from the reference's where both get the same inputs, so that errors do not add up."


def trace(report: Facts) -> Section | None:
    """The section, where layers were traced."""
    found = artifacts_with(report, "trace")
    figures = [_figure(*item) for item in found if any(item[2].get(key) for key in ("layers", "broken", "note"))]
    return Section("trace", "Layer by layer", LEAD, "trace.html", {"figures": figures}) if figures else None


def _figure(place: int, artifact: Facts, facts: Facts) -> dict[str, Any]:
    layers = [(text(layer, "name"), number(layer, "error")) for layer in parts(facts, "layers")]
    errors = [(name, error) for name, error in layers if error is not None]
    broken = part(facts, "broken")
    chart = _chart(f"trace-{place}", name_of(artifact), errors, text(broken, "name")) if len(errors) > 1 else None
    return {"artifact": artifact, "note": text(facts, "note"), "broken": broken, "chart": chart, "layers": layers}


def _chart(place: str, name: str, errors: Sequence[tuple[str, float]], broken: str) -> Chart:
    plane = _plane([error for _, error in errors])
    points = [(plane.across.place(number), plane.up.place(error)) for number, (_, error) in enumerate(errors)]
    layer, largest = max(errors, key=lambda item: item[1])
    ticks = [value for value in plane.across.ticks(9) if value == int(value) and 0 <= value < len(errors)]
    shapes = [
        *level_axis(plane, "relative error", 5),
        *axis_below(plane, "layers, in the order they run", [(value, f"{value:.0f}") for value in ticks]),
        *path(points, "series-line series-0"),
        *(shape for (x, y), item in zip(points, errors, strict=True) for shape in _spot(x, y, *item, broken)),
    ]
    description = (
        f"{counted(len(errors), 'layer')}; the largest error is {significant(largest, 2)}, in {layer}. A table has all."
    )
    return Chart(place, f"Error of each layer, {name}", description, plane, shapes)


def _plane(errors: list[float]) -> Plane:
    across = (-0.5, len(errors) - 0.5)
    if min(errors) > 0:
        return FRAME.plane(across, around(errors, 1.6), (False, True))
    return FRAME.plane(across, (0.0, max(*errors, 1e-12) * 1.1))


def _spot(x: float, y: float, name: str, error: float, broken: str) -> list[Shape]:
    """A layer; one that broke, or that holds what broke, is marked and named."""
    said = f"{name}: {significant(error, 2)}"
    if not broken or not (broken == name or broken.startswith(f"{name}.")):
        return [mark(x, y, 0, said)]
    named = Words(x, y - 14, "broke here", "middle", "broken-name")
    return [Circle(x, y, 9, "ring"), mark(x, y, 0, said, "broken"), named]
