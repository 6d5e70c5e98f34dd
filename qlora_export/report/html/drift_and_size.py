"""Drift against size: which artifacts nothing smaller is better than."""

from __future__ import annotations

from qlora_export.drift.comparison.pareto import NOISE_NATS, front
from qlora_export.report.html.elements import Markup, code, element, joined
from qlora_export.report.html.figures import significant
from qlora_export.report.html.reading import Facts, artifacts, number, part
from qlora_export.report.html.scatter import Point, scatter
from qlora_export.report.html.section import Section, name_of
from qlora_export.report.html.table import Cell, Column, folded, measured, table
from qlora_export.report.html.verdicts import badge, outcome

HEADING = "Drift against size"
COLUMNS = (
    Column("artifact"), Column("MB", numeric=True), Column("mean KL", numeric=True), Column("on the front"),
    Column("verdict"),
)  # fmt: skip


def drift_and_size(report: Facts) -> Section | None:
    """The section, where at least two artifacts have both numbers."""
    placed = [artifact for artifact in artifacts(report) if _place(artifact) is not None]
    if len(placed) < 2:
        return None
    leading = _leading(placed)
    points = [_point(artifact, place in leading) for place, artifact in enumerate(placed)]
    lead = "Down and to the left is better. The stairs are the front: nothing that small drifts less."
    body = joined(scatter(points, _common_limit(placed)), _key(placed), _table(placed, leading))
    return Section("size", HEADING, lead, body)


def _place(artifact: Facts) -> tuple[float, float] | None:
    """Bytes and mean KL, no less than what is noise."""
    stored, mean = number(artifact, "bytes"), number(part(artifact, "drift"), "mean_kl")
    return None if not stored or mean is None else (stored, max(mean, NOISE_NATS))


def _leading(placed: list[Facts]) -> set[int]:
    """The front, by places in the list: two artifacts may have one name."""
    places = {str(place): found for place, item in enumerate(placed) if (found := _place(item)) is not None}
    return {int(place) for place in front(places)}


def _point(artifact: Facts, leads: bool) -> Point:
    stored, mean = _place(artifact) or (1.0, NOISE_NATS)
    stderr = number(part(artifact, "drift"), "mean_kl_stderr") or 0.0
    return Point(name_of(artifact), stored / 1e6, mean, stderr, outcome(artifact), leads)


def _common_limit(placed: list[Facts]) -> float | None:
    limits = {number(part(artifact, "limits"), "mean_kl") for artifact in placed}
    return limits.pop() if len(limits) == 1 else None


def _key(placed: list[Facts]) -> Markup:
    noise = ""
    if any((number(part(artifact, "drift"), "mean_kl") or 0.0) <= NOISE_NATS for artifact in placed):
        noise = f" What drifts less than {significant(NOISE_NATS)} nats is drawn there: rounding of sums would move it."
    said = "Circles passed, crosses failed, diamonds are open; bars are 95% intervals, names of the front are bold."
    return element("p", said + noise, class_="said")


def _table(placed: list[Facts], leading: set[int]) -> Markup:
    rows = [_row(artifact, place in leading) for place, artifact in enumerate(placed)]
    return folded("The numbers", table("Size and mean KL of every artifact", COLUMNS, rows, sortable=True))


def _row(artifact: Facts, leads: bool) -> list[Cell | Markup | str]:
    stored, drift = number(artifact, "bytes") or 0.0, part(artifact, "drift")
    mean = number(drift, "mean_kl")
    shown = measured(significant(mean, 2), number(drift, "mean_kl_stderr"))
    return [
        code(name_of(artifact)),
        Cell(f"{stored / 1e6:.2f}", stored),
        Cell(shown, mean),
        "yes" if leads else "no",
        badge(artifact),
    ]
