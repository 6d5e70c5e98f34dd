"""Which artifact to take: the smallest that keeps the recipe's limits; and which are on the front of size and drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_export.drift.comparison.rows import Comparison, Measured
from qlora_export.drift.gate import checks

# Below this, another order of adding up float32 activations would move it.
NOISE_NATS = 1e-6


@dataclass(frozen=True)
class Recommendation:
    """The name of the artifact to take, None where none keeps the limits; and why, in sentences."""

    name: str | None
    why: tuple[str, ...]


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names that no other is at least as good as in both numbers and better in one, by the first number."""
    found: list[str] = []
    lowest = float("inf")
    for name in sorted(points, key=lambda name: points[name]):
        if points[name][1] < lowest:
            lowest = points[name][1]
            found.append(name)
    return found


def points(comparison: Comparison) -> dict[str, tuple[float, float]]:
    """Size in bytes and mean KL in nats of every row that has numbers; no less than what is noise."""
    measured = {row.name: row.measured for row in comparison.rows if row.measured is not None}
    return {name: (found.bytes, max(found.entry.drift.mean_kl, NOISE_NATS)) for name, found in measured.items()}


def recommend(comparison: Comparison) -> Recommendation:
    """The smallest that passes, and what keeps smaller ones from it; else which limits are in the way."""
    measured = [(row.name, row.measured) for row in comparison.rows if row.measured is not None]
    passing = [name for name, found in measured if found.entry.verdict.outcome == "pass"]
    if not passing:
        return Recommendation(None, _in_the_way(measured))
    smaller = measured[: [name for name, _ in measured].index(passing[0])]
    return Recommendation(passing[0], tuple(_why_not(name, found) for name, found in smaller))


def _why_not(name: str, found: Measured) -> str:
    return f"{name} is smaller and does not pass: {found.entry.verdict.reasons[0]}"


def _in_the_way(measured: Sequence[tuple[str, Measured]]) -> tuple[str, ...]:
    """For every limit that somebody breaks, how many do and who comes nearest."""
    if not measured:
        return ("nothing could be measured",)
    why = []
    found = {name: {check.name: check for check in checks(row.entry.drift, row.entry.limits)} for name, row in measured}
    limits = dict.fromkeys(limit for named in found.values() for limit in named)
    for limit in limits:
        rows = {name: named[limit] for name, named in found.items() if limit in named}
        broken = [name for name, check in rows.items() if check.outcome != "pass"]
        if broken:
            sign = -1 if rows[broken[0]].above else 1
            nearest = min(rows, key=lambda name: sign * rows[name].value)
            check = rows[nearest]
            bound = f"{'at least' if check.above else 'at most'} {check.limit:g}"
            close = f"nearest is {nearest} with {check.value:.4g}"
            why.append(f"{limit} stops {len(broken)} of {len(rows)}, the limit is {bound}: {close}")
    unjudged = [name for name, row in measured if row.entry.verdict.outcome == "inconclusive"]
    if unjudged:
        reason = next(row for name, row in measured if name == unjudged[0]).entry.verdict.reasons[-1]
        why.append(f"not decided: {', '.join(unjudged)}; of {unjudged[0]}, {reason}")
    return tuple(why)
