"""From per-token numbers to drift with standard errors.

Tokens of one window depend on each other, and windows of one document do, so errors come from a bootstrap over blocks:
documents or windows, cut into pieces where they are fewer than 32 (1,000 resamples, fixed seed). The perplexity ratio
is paired, token by token, which makes its error several times smaller than that of either
perplexity. The share of the gain kept is (NLL_base - NLL_artifact) / (NLL_base - NLL_reference). Source of the
statistics: llama.cpp's perplexity tool with --kl-divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlora_export.drift.results import Drift, Measurement, Sample
from qlora_export.drift.tokens import TokenSet, first_windows

RESAMPLES = 1000
FEWEST_BLOCKS = 32
LEAST_PIECE = 16
SEED = 0
SAMPLE_TOKENS = 256
SMALLEST_GAIN_NATS = 1e-3

Values = NDArray[np.float64]


class Bootstrap:
    """Means of per-token columns over resampled blocks."""

    def __init__(self, tokens: TokenSet) -> None:
        counts = np.array(block_counts(tokens))
        self._starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        rng = np.random.default_rng(SEED)
        self._weights = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), RESAMPLES)
        self._totals = self._weights @ counts

    def means(self, values: Values) -> Values:
        """The mean of a column in every resample."""
        sums = np.add.reduceat(values, self._starts)
        result: Values = self._weights @ sums / self._totals
        return result

    def stderr(self, statistic: Callable[..., Values], *columns: Values) -> float:
        """Standard error of a statistic of the columns' means."""
        return float(np.std(statistic(*(self.means(column) for column in columns)), ddof=1))


def block_counts(tokens: TokenSet) -> list[int]:
    """Scored tokens of each block, in order; where there are few blocks, of pieces of at least `LEAST_PIECE` tokens."""
    found: list[int] = []
    last: int | None = None
    for window in tokens.windows:
        if window.block == last:
            found[-1] += len(window.scored)
        else:
            found.append(len(window.scored))
        last = window.block
    if len(found) >= FEWEST_BLOCKS:
        return found
    piece = max(LEAST_PIECE, -(-tokens.count // FEWEST_BLOCKS))
    return [min(piece, count - first) for count in found for first in range(0, count, piece)]


def compare(candidate: Measurement, reference: Measurement, base: Measurement, tokens: TokenSet) -> Drift:
    """Drift of a candidate from the reference; all three measured on the same tokens."""
    bootstrap = Bootstrap(tokens)
    same = (candidate.top1 == reference.top1).astype(np.float64)
    ratio = candidate.nll - reference.nll
    perplexity, reference_perplexity = float(np.exp(candidate.nll.mean())), float(np.exp(reference.nll.mean()))
    gain: float | None = None
    gain_stderr: float | None = None
    if base.nll.mean() - reference.nll.mean() > SMALLEST_GAIN_NATS:
        gain = float(_gain_kept(base.nll.mean(), candidate.nll.mean(), reference.nll.mean()))
        gain_stderr = bootstrap.stderr(_gain_kept, base.nll, candidate.nll, reference.nll)
    return Drift(
        perplexity=perplexity,
        perplexity_stderr=perplexity * bootstrap.stderr(_itself, candidate.nll),
        perplexity_reference=reference_perplexity,
        perplexity_reference_stderr=reference_perplexity * bootstrap.stderr(_itself, reference.nll),
        ln_ppl_ratio=float(ratio.mean()),
        ln_ppl_ratio_stderr=bootstrap.stderr(_itself, ratio),
        mean_kl=float(candidate.kl.mean()),
        mean_kl_stderr=bootstrap.stderr(_itself, candidate.kl),
        median_kl=float(np.median(candidate.kl)),
        kl_99=float(np.percentile(candidate.kl, 99)),
        same_top1=float(same.mean()),
        same_top1_stderr=max(bootstrap.stderr(_itself, same), _binomial_stderr(same)),
        gain_kept=gain,
        gain_kept_stderr=gain_stderr,
    )


@dataclass(frozen=True)
class Beside:
    """How much further an artifact drifts than another one: paired differences, errors are standard errors."""

    artifact: str
    mean_kl: float
    mean_kl_stderr: float
    ln_ppl_ratio: float
    ln_ppl_ratio_stderr: float


def beside(candidate: Measurement, yardstick: Measurement, tokens: TokenSet) -> Beside:
    """A candidate next to another, both measured on the same tokens."""
    bootstrap = Bootstrap(tokens)
    further, ratio = candidate.kl - yardstick.kl, candidate.nll - yardstick.nll
    return Beside(
        yardstick.name,
        mean_kl=float(further.mean()),
        mean_kl_stderr=bootstrap.stderr(_itself, further),
        ln_ppl_ratio=float(ratio.mean()),
        ln_ppl_ratio_stderr=bootstrap.stderr(_itself, ratio),
    )


def sample_of(candidate: Measurement, reference: Measurement, tokens: TokenSet) -> Sample:
    """The candidate on the leading windows: enough to notice another model, few enough to repeat anywhere."""
    count = first_windows(tokens, SAMPLE_TOKENS).count
    return Sample(count, float(candidate.nll[:count].mean()), float(reference.nll[:count].mean()))


def _binomial_stderr(same: Values) -> float:
    """Agresti and Coull's standard error of a share, which is not zero when every token agrees."""
    share = (same.sum() + 2) / (same.size + 4)
    return float(np.sqrt(share * (1 - share) / (same.size + 4)))


def _itself(values: Values) -> Values:
    return values


def _gain_kept(base: Values, candidate: Values, reference: Values) -> Values:
    result: Values = (base - candidate) / (base - reference)
    return result
