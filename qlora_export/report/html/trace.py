"""How far every layer is from the reference's on the same inputs, in the order they run, and the one that broke."""

from __future__ import annotations

from qlora_export.report.html.chart import Plane, axis_name, chart, level_axis, line, mark, path, words
from qlora_export.report.html.elements import Child, Markup, code, element, joined
from qlora_export.report.html.figures import counted, significant
from qlora_export.report.html.reading import Facts, artifacts_with, number, part, parts, text
from qlora_export.report.html.scale import Scale, around
from qlora_export.report.html.section import Section, artifact_heading, name_of
from qlora_export.report.html.table import Cell, Column, folded, table
from qlora_export.report.html.verdicts import marked

WIDTH, HEIGHT = 560.0, 260.0
LEFT, RIGHT, TOP, BOTTOM = 68.0, 548.0, 34.0, 214.0
COLUMNS = (Column("layer"), Column("error", numeric=True))


def trace(report: Facts) -> Section | None:
    """The section, where layers were traced."""
    found = artifacts_with(report, "trace")
    figures = [_figure(*item) for item in found if any(item[2].get(key) for key in ("layers", "broken", "note"))]
    if not figures:
        return None
    lead = "How far each layer is from the reference's where both get the same inputs, so that errors do not add up."
    return Section("trace", "Layer by layer", lead, element("div", figures, class_="figures"))


def _figure(place: int, artifact: Facts, facts: Facts) -> Markup:
    known = [(text(layer, "name"), number(layer, "error")) for layer in parts(facts, "layers")]
    errors = [(name, error) for name, error in known if error is not None]
    return element(
        "figure",
        element("figcaption", artifact_heading(artifact)),
        _verdict(facts),
        _chart(f"trace-{place}", artifact, facts, errors) if len(errors) > 1 else None,
        folded("The numbers", _table(artifact, known)) if known else None,
    )


def _verdict(facts: Facts) -> Markup:
    """In a sentence: which layer broke, that none did, or why they were not compared."""
    broken, note = part(facts, "broken"), text(facts, "note")
    if note:
        return element("p", f"Layers were not compared: {note}.", class_="said")
    if not broken:
        return element("p", "No layer stands out.", class_="said")
    error, usual = (significant(number(broken, key), 2) for key in ("error", "usual"))
    return element(
        "p", marked("fail", "broke"), " ", code(text(broken, "name")), f" is off by {error}; {usual} is usual."
    )


def _chart(place: str, artifact: Facts, facts: Facts, errors: list[tuple[str, float]]) -> Markup:
    plane = _plane([error for _, error in errors])
    points = [(plane.across.place(number), plane.up.place(error)) for number, (_, error) in enumerate(errors)]
    name, largest = max(errors, key=lambda item: item[1])
    broken = text(part(facts, "broken"), "name")
    return chart(
        place,
        f"Error of each layer, {name_of(artifact)}",
        f"{counted(len(errors), 'layer')}; the largest error is {significant(largest, 2)}, in {name}. A table has all.",
        plane,
        level_axis(plane, "relative error", 5),
        line(plane.left, plane.bottom, plane.right, plane.bottom, "axis"),
        _layer_ticks(plane, len(errors)),
        axis_name(plane, "layers, in the order they run"),
        path(points, "series-line series-0"),
        [_spot(x, y, *item, broken) for (x, y), item in zip(points, errors, strict=True)],
    )


def _plane(errors: list[float]) -> Plane:
    across = Scale(-0.5, len(errors) - 0.5, LEFT, RIGHT)
    if min(errors) > 0:
        return Plane(WIDTH, HEIGHT, across, Scale(*around(errors, 1.6), BOTTOM, TOP, logarithmic=True))
    return Plane(WIDTH, HEIGHT, across, Scale(0.0, max(*errors, 1e-12) * 1.1, BOTTOM, TOP))


def _layer_ticks(plane: Plane, layers: int) -> Markup:
    ticks = [value for value in plane.across.ticks(9) if value == int(value) and 0 <= value < layers]
    return joined([words(plane.across.place(value), plane.bottom + 18, f"{value:.0f}") for value in ticks])


def _spot(x: float, y: float, name: str, error: float, broken: str) -> Markup:
    """A layer; one that broke, or that holds what broke, is marked and named."""
    said = f"{name}: {significant(error, 2)}"
    if not broken or not (broken == name or broken.startswith(f"{name}.")):
        return mark(x, y, 0, said)
    ring = element("circle", cx=x, cy=y, r=9, class_="ring")
    named = words(x, y - 14, "broke here", "middle", "broken-name")
    return joined(ring, mark(x, y, 0, said, "broken"), named)


def _table(artifact: Facts, known: list[tuple[str, float | None]]) -> Markup:
    rows: list[list[Cell | Child]] = [[code(name), Cell(significant(error, 3), error)] for name, error in known]
    return table(f"Error of each layer of {name_of(artifact)}", COLUMNS, rows)
