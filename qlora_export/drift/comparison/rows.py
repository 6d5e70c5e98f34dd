"""The rows of a comparison: what became of each candidate, and what all of them are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_export.drift.comparison.candidates import Candidate
from qlora_export.drift.comparison.costs import Cost, LowRankCost
from qlora_export.drift.comparison.speed import Speed
from qlora_export.drift.ledger import Entry
from qlora_export.drift.results import Drift
from qlora_export.drift.tokens import TokenSet
from qlora_export.recipe.config import Limits
from qlora_export.types import Onto, Rounding


@dataclass(frozen=True)
class Measured:
    """An artifact that was built and measured; `cost` is None where an exporter wrote the bytes.

    `rounding` is the one that was chosen, None where nothing is rounded to a grid. `base_speed` is that of fp32, where
    it was measured too.
    """

    entry: Entry
    bytes: int
    onto: Onto
    rounding: Rounding | None
    cost: Cost | None
    speed: Speed
    base_speed: Speed | None = None

    @property
    def prefill_ratio(self) -> float | None:
        """How many times as fast as fp32 it reads."""
        return self.speed.prefill / self.base_speed.prefill if self.base_speed else None

    @property
    def decode_ratio(self) -> float | None:
        """How many times as fast as fp32 it writes."""
        base = self.base_speed.decode if self.base_speed else None
        return self.speed.decode / base if self.speed.decode and base else None


@dataclass(frozen=True)
class Row:
    """A candidate with its numbers, or with the reason why it has none."""

    candidate: Candidate
    measured: Measured | None = None
    reason: str | None = None

    @property
    def name(self) -> str:
        """Name of the row and of the artifact's folder."""
        return self.candidate.name


@dataclass(frozen=True)
class Comparison:
    """All rows on one set of tokens, by size; `fp32_*` are those of the merged model in float32, by its plan.

    `weights` counts the linear weights that formats encode, `low_rank` is the adapter's arithmetic.
    """

    recipe_digest: str
    tokens: TokenSet
    reference: Drift
    base: Drift | None
    merged: Drift | None
    limits: Limits
    rows: tuple[Row, ...]
    weights: int
    fp32_bytes: int
    fp32_cost: Cost
    low_rank: LowRankCost | None
    notes: tuple[str, ...] = ()


def by_size(rows: list[Row]) -> tuple[Row, ...]:
    """The smallest first, of equal ones the nearer to what was trained; rows without numbers last."""

    def key(row: Row) -> tuple[float, float]:
        if row.measured is None:
            return (float("inf"), 0.0)
        return (row.measured.bytes, row.measured.entry.drift.mean_kl)

    return tuple(sorted(rows, key=key))
