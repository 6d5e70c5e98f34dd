"""What measuring gives: numbers by token, the drift between two, the verdict on it, and what a passing one allows."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qlora_export.artifact import Artifact
from qlora_export.errors import GateFailed
from qlora_export.types import Float32

Outcome = Literal["pass", "fail", "inconclusive", "not-measured"]


@dataclass(frozen=True)
class Measurement:
    """One model on the scored tokens: NLL and KL(reference || model) [tokens] in nats, top-1 token ids [tokens].

    `confidence` is the probability [tokens] that the model gives its top-1 token. `nonfinite` counts tokens whose
    distribution held NaN or infinity; such a measurement is never averaged.
    """

    name: str
    runtime: str
    nll: NDArray[np.float64]
    top1: NDArray[np.int64]
    kl: NDArray[np.float64]
    confidence: Float32
    nonfinite: int = 0


@dataclass(frozen=True)
class Drift:
    """How far one artifact is from the model that was trained; errors are standard errors, logarithms natural.

    Survival is that of the adapted matrices, median and lowest with its tensor, and so is what calibration measured of
    it in the layers' outputs. `codes_changed_median` is of the shares of 4-bit codes that training did not have.
    """

    perplexity: float
    perplexity_stderr: float
    perplexity_reference: float
    perplexity_reference_stderr: float
    ln_ppl_ratio: float
    ln_ppl_ratio_stderr: float
    mean_kl: float
    mean_kl_stderr: float
    median_kl: float
    kl_99: float
    same_top1: float
    same_top1_stderr: float
    gain_kept: float | None
    gain_kept_stderr: float | None
    survival_median: float | None = None
    survival_min: float | None = None
    survival_min_tensor: str | None = None
    codes_changed_median: float | None = None
    weighted_survival_median: float | None = None
    weighted_survival_min: float | None = None
    weighted_survival_min_tensor: str | None = None


# What a drift may lack for reasons of its own; any other number is missing only where it was not finite.
MAY_LACK = frozenset(item.name for item in fields(Drift) if str(item.type).endswith("| None"))


@dataclass(frozen=True)
class Verdict:
    """The gate's decision on one artifact and its reasons."""

    outcome: Outcome
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verified:
    """An artifact with a passing verdict on these very bytes; made by the gate alone, the only thing published."""

    artifact: Artifact
    verdict: Verdict
    drift: Drift

    def __post_init__(self) -> None:
        if self.verdict.outcome != "pass":
            raise GateFailed(
                f"{self.artifact.name}: the verdict is {self.verdict.outcome}", "only a passing artifact is published"
            )


@dataclass(frozen=True)
class Sample:
    """Mean NLL in nats of an artifact over the first scored tokens, as measured: what reading it again must give."""

    tokens: int
    nll: float
    nll_reference: float
