"""Drift against size: which artifacts nothing smaller is better than."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_export.drift.comparison.pareto import NOISE_NATS, front
from qlora_export.report.html.figures import significant
from qlora_export.report.html.reading import Facts, artifacts, number, part
from qlora_export.report.html.scatter import Point, scatter
from qlora_export.report.html.section import Section, name_of
from qlora_export.report.html.verdicts import outcome

LEAD = "Down and to the left is better. The stairs are the front: nothing that small drifts less."


def drift_and_size(report: Facts) -> Section | None:
    """The section, where at least two artifacts have both numbers."""
    rows = placed_points(artifacts(report))
    if len(rows) < 2:
        return None
    points = [point for _, point in rows]
    limits = {number(part(artifact, "limits"), "mean_kl") for artifact, _ in rows}
    facts = {
        "chart": scatter(points, limits.pop() if len(limits) == 1 else None),
        "noise": significant(NOISE_NATS) if min(point.drift for point in points) <= NOISE_NATS else "",
        "rows": rows,
    }
    return Section("size", "Drift against size", LEAD, "size.html", facts)


def placed_points(artifacts: Sequence[Facts]) -> list[tuple[Facts, Point]]:
    """Those that have a size and a mean KL with their points; no drift is less than what is noise."""
    placed = [
        (artifact, (stored, max(drift, NOISE_NATS)))
        for artifact in artifacts
        if (stored := number(artifact, "bytes")) and (drift := number(part(artifact, "drift"), "mean_kl")) is not None
    ]
    # Two artifacts may have one name.
    leading = front({str(place): numbers for place, (_, numbers) in enumerate(placed)})
    return [
        (artifact, _point(artifact, *numbers, str(place) in leading))
        for place, (artifact, numbers) in enumerate(placed)
    ]


def _point(artifact: Facts, stored: float, drift: float, leads: bool) -> Point:
    stderr = number(part(artifact, "drift"), "mean_kl_stderr") or 0.0
    return Point(name_of(artifact), stored / 1e6, drift, stderr, outcome(artifact), leads)
