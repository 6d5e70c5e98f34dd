"""One model run in several ways that must agree: whole or token by token, alone or in a batch, optimised or not.

Two ways are compared by KL(first || second), and by their most likely tokens. Of two tokens that are about as likely as
each other rounding may turn the order, so those are near ties: where each way puts its own token ahead of the other's
by no more than what a KL of the limit could come from. (Moving d nats between two tokens of probability a half each
gives a KL of d^2 / 8.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlora_export.drift.divergence import divergences
from qlora_export.types import Float32

SAME_MODEL_KL = 1e-4
# The same integers, which torch rounds to 16 bits once they are decoded.
SAME_INTEGERS_KL = 1e-3


@dataclass(frozen=True)
class Distance:
    """Two ways on some tokens; `top1_differs` leaves `near_ties` out. Without a `limit` it is only told."""

    tokens: int
    mean_kl: float
    max_kl: float
    top1_differs: int
    near_ties: int
    limit: float | None

    @property
    def agrees(self) -> bool:
        """Whether both compute the same, where there is a limit to it; not so where a number is NaN."""
        return self.limit is None or (self.mean_kl <= self.limit and not self.top1_differs)

    def said(self) -> str:
        """Why not, in words."""
        if self.limit is not None and not self.mean_kl <= self.limit:
            return f"mean KL {self.mean_kl:.2g} over {self.tokens} tokens, the limit is at most {self.limit:.2g}"
        return f"{self.top1_differs} of {self.tokens} most likely tokens differ, near ties not counted"


@dataclass(frozen=True)
class VariantDistances:
    """A way, and how far it is from prefill and from the source's model in torch; None where that is not compared."""

    name: str
    from_prefill: Distance | None
    from_source: Distance | None


@dataclass(frozen=True)
class GraphFindings:
    """What running a graph in every way came to, on windows of these lengths.

    `accuracy_level` is that of its MatMulNBits as shipped. `source` names the model in torch, where there was one;
    `departs` is the first layer that computes something else, where a way does.
    """

    weights: str
    accuracy_level: int | None
    window_tokens: tuple[int, ...]
    source: str | None
    ways: tuple[VariantDistances, ...]
    departs: str | None
    breaches: tuple[str, ...]


def near_tie_nats(kl: float) -> float:
    """The lead over an equally likely token that such a KL can turn over."""
    return math.sqrt(8 * kl)


def distance(first: Sequence[Float32], second: Sequence[Float32], limit: float | None = None) -> Distance:
    """Two ways by their log-probabilities [tokens, vocabulary] of the same windows."""
    one, other = np.concatenate(first), np.concatenate(second)
    with np.errstate(invalid="ignore", over="ignore"):
        found = divergences(one, other)
    every = np.arange(len(one))
    ours, theirs = one.argmax(axis=1), other.argmax(axis=1)
    differs = ours != theirs
    leads = np.maximum(one[every, ours] - one[every, theirs], other[every, theirs] - other[every, ours])
    ties = differs & (leads <= near_tie_nats(SAME_MODEL_KL if limit is None else limit))
    finite = bool(np.isfinite(one).all() and np.isfinite(other).all() and np.isfinite(found).all())
    return Distance(
        tokens=len(one),
        mean_kl=float(found.mean()) if finite else math.nan,
        max_kl=float(found.max()) if finite else math.nan,
        top1_differs=int((differs & ~ties).sum()),
        near_ties=int(ties.sum()),
        limit=limit,
    )
