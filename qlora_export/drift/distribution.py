"""How a candidate's differences are spread over the tokens: what a mean does not tell.

Delta p is the change of the true token's probability, candidate minus reference, as llama.cpp's perplexity tool has it.
Buckets are by the probability that the reference gives its most likely token: tokens on which it is unsure dominate the
mean KL of a sound model, while a broken one also drifts where the reference was certain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from qlora_export.drift.results import Measurement
from qlora_export.drift.statistics import Bootstrap
from qlora_export.drift.tokens import TokenSet

KL_QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)
DELTA_QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
CONFIDENCE_EDGES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
# Three bins a factor of ten, from what float32 cannot tell from nothing to a wholly other distribution.
KL_EDGES = tuple(float(f"{10 ** (power / 3):.3g}") for power in range(-24, 4))

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Bucket:
    """The tokens on which the reference's largest probability is from `low` to `high`; None where there are none."""

    low: Annotated[float, Field(serialization_alias="from")]
    high: Annotated[float, Field(serialization_alias="to")]
    tokens: int
    mean_kl: float | None
    mean_kl_stderr: float | None
    same_top1: float | None


@dataclass(frozen=True)
class Histogram:
    """Tokens below the first of `edges`, between two, and above the last."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Distribution:
    """Quantiles of KL in nats and of delta p by share, the histogram of KL, and both by confidence of the reference."""

    kl_quantiles: dict[str, float]
    kl_histogram: Histogram
    delta_p_mean: float
    delta_p_rms: float
    delta_p_quantiles: dict[str, float]
    confidence: tuple[Bucket, ...]
    nonfinite: int


def distribution_of(candidate: Measurement, reference: Measurement, tokens: TokenSet) -> Distribution:
    """The spread of a candidate's differences from the reference."""
    delta = np.exp(-candidate.nll) - np.exp(-reference.nll)
    places = np.searchsorted(KL_EDGES, candidate.kl, side="right")
    return Distribution(
        kl_quantiles=_quantiles(candidate.kl, KL_QUANTILES),
        kl_histogram=Histogram(KL_EDGES, tuple(np.bincount(places, minlength=len(KL_EDGES) + 1).tolist())),
        delta_p_mean=float(delta.mean()),
        delta_p_rms=float(np.sqrt(np.square(delta).mean())),
        delta_p_quantiles=_quantiles(delta, DELTA_QUANTILES),
        confidence=_buckets(candidate, reference, Bootstrap(tokens)),
        nonfinite=candidate.nonfinite,
    )


def _quantiles(values: Values, shares: Sequence[float]) -> dict[str, float]:
    return dict(zip(map("{:g}".format, shares), np.quantile(values, shares).tolist(), strict=True))


def _buckets(candidate: Measurement, reference: Measurement, bootstrap: Bootstrap) -> tuple[Bucket, ...]:
    same = candidate.top1 == reference.top1
    places = np.searchsorted(CONFIDENCE_EDGES[1:-1], reference.confidence, side="right")
    found = []
    for number, (low, high) in enumerate(pairwise(CONFIDENCE_EDGES)):
        inside = places == number
        count = int(inside.sum())
        if not count:
            found.append(Bucket(low, high, 0, None, None, None))
            continue
        mean = float(candidate.kl[inside].mean())
        stderr = bootstrap.stderr(_share, np.where(inside, candidate.kl, 0.0), inside.astype(np.float64))
        found.append(Bucket(low, high, count, mean, stderr, float(same[inside].mean())))
    return tuple(found)


def _share(part: Values, whole: Values) -> Values:
    """The mean over the tokens that count; a resample without any says zero."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
