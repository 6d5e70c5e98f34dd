"""The gate: limits against numbers, and the only place where a `Verified` is made.

A limit is broken when even the favourable end of the number's 95 % interval breaks it, kept when the unfavourable end
keeps it, and open in between: then the verdict is inconclusive and says how many tokens would decide it four times in
five, if the number stays what it is (errors fall with the square root of the tokens). Of a calibrated artifact survival
is judged in the outputs of its layers, which is what calibration preserves
(`docs/decisions/025-survival-of-calibrated-layers.md`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_export.artifact import Artifact
from qlora_export.drift.results import Drift, Outcome, Verdict, Verified
from qlora_export.drift.statistics import Beside
from qlora_export.drift.tokens import Unit
from qlora_export.errors import GateFailed, VerifyMismatch
from qlora_export.recipe.config import Limits

Z_95 = 1.959964
# What four of five repetitions fall short of at most.
Z_POWER = 0.841621
FEWEST_TOKENS = 100
DEFAULT_LIMITS = Limits(perplexity_ratio=1.03, mean_kl=0.05, same_top1=0.95, gain_kept=0.95, survival_min=0.9)


@dataclass(frozen=True)
class Check:
    """One number against its limit; `above` says that the number must not be below."""

    name: str
    value: float
    stderr: float
    limit: float
    above: bool
    place: str | None = None

    @property
    def outcome(self) -> Outcome:
        """pass, fail or inconclusive."""
        margin = self.value - self.limit if self.above else self.limit - self.value
        reach = Z_95 * self.stderr
        if margin >= reach:
            return "pass"
        return "inconclusive" if margin > -reach else "fail"

    def reason(self, tokens: int, unit: Unit = "tokens") -> str:
        """The check in words, given how many of what were scored."""
        sign = "at least" if self.above else "at most"
        error = f" ± {self.stderr:.2g}" if self.stderr else ""
        place = f" in {self.place}" if self.place else ""
        text = f"{self.name} is {self.value:.4g}{error}{place}, the limit is {sign} {self.limit:g}"
        if self.outcome != "inconclusive":
            return text
        distance = abs(self.value - self.limit)
        if distance == 0:
            return f"{text}: no number of {unit} decides a value on its limit"
        more = deciding_tokens(tokens, self.stderr, distance) - tokens
        return f"{text}: about {more} more {unit} are needed to decide"


def deciding_tokens(tokens: int, stderr: float, distance: float) -> int:
    """How many tokens tell a distance from zero at 95 %, four times in five, given the error with some tokens."""
    return math.ceil(tokens * ((Z_95 + Z_POWER) * stderr / distance) ** 2)


def checks(drift: Drift, limits: Limits, further: Beside | None = None) -> list[Check]:
    """Every number that has a limit; `further` is what the artifact drifts further than its yardstick."""
    ratio = math.exp(drift.ln_ppl_ratio)
    survival, lowest = drift.survival_min, drift.survival_min_tensor
    if drift.weighted_survival_min is not None:
        survival, lowest = drift.weighted_survival_min, drift.weighted_survival_min_tensor
    found = [
        ("perplexity ratio", ratio, ratio * drift.ln_ppl_ratio_stderr, limits.perplexity_ratio, False, None),
        ("mean KL", drift.mean_kl, drift.mean_kl_stderr, limits.mean_kl, False, None),
        ("same top-1", drift.same_top1, drift.same_top1_stderr, limits.same_top1, True, None),
        ("gain kept", drift.gain_kept, drift.gain_kept_stderr or 0.0, limits.gain_kept, True, None),
        ("lowest survival", survival, 0.0, limits.survival_min, True, lowest),
    ]
    return [
        Check(name, value, stderr, limit, above, place)
        for name, value, stderr, limit, above, place in (*found, *_further(limits, further))
        if value is not None and limit is not None
    ]


def _further(limits: Limits, further: Beside | None) -> list[tuple[str, float, float, float, bool, str | None]]:
    yardstick = limits.no_worse_than
    if yardstick is None or further is None:
        return []
    ratio = math.exp(further.ln_ppl_ratio)
    stderr = ratio * further.ln_ppl_ratio_stderr
    return [
        (f"mean KL above {further.artifact}", further.mean_kl, further.mean_kl_stderr, yardstick.mean_kl, False, None),
        (f"perplexity ratio to {further.artifact}", ratio, stderr, yardstick.perplexity_ratio, False, None),
    ]


def judge(
    drift: Drift,
    limits: Limits,
    tokens: int,
    nonfinite: int,
    further: Beside | None = None,
    unit: Unit = "tokens",
) -> Verdict:
    """The verdict on one artifact: fail before inconclusive before pass, with the reasons that decide."""
    if nonfinite:
        return Verdict("fail", (f"{nonfinite} {unit} have a distribution with NaN or infinity",))
    results = checks(drift, limits, further)
    if reasons := tuple(check.reason(tokens, unit) for check in results if check.outcome == "fail"):
        return Verdict("fail", reasons)
    reasons = tuple(check.reason(tokens, unit) for check in results if check.outcome == "inconclusive")
    if drift.gain_kept is None and limits.gain_kept is not None:
        reasons += ("gain kept has no number, since the adapter is no better than its base on this text",)
    if drift.survival_min is None and limits.survival_min is not None:
        reasons += ("survival has no number, since these weights cannot be read back",)
    if tokens < FEWEST_TOKENS:
        reasons += (f"{tokens} {unit} are too few to judge anything, {FEWEST_TOKENS} are the least",)
    return Verdict("inconclusive", reasons) if reasons else Verdict("pass")


def failed_by(verdict: Verdict, breaches: Sequence[str]) -> Verdict:
    """The verdict, failed where something beside the numbers is wrong, which is said first."""
    if not breaches:
        return verdict
    return Verdict("fail", (*breaches, *(verdict.reasons if verdict.outcome == "fail" else ())))


def verify(artifact: Artifact, verdict: Verdict, drift: Drift) -> Verified:
    """The artifact as fit to be published; raises GateFailed, or VerifyMismatch when its manifest changed meanwhile."""
    found = hashlib.sha256((artifact.path / "manifest.json").read_bytes()).hexdigest()
    if artifact.manifest_sha256 != found:
        raise VerifyMismatch(f"{artifact.path}: the manifest changed while it was measured", "run the check again")
    return Verified(artifact, verdict, drift)


def recall(artifact: Artifact, recorded: Mapping[str, Any]) -> Verified:
    """An artifact that was measured before, by its entry in the report; raises GateFailed when it did not pass."""
    if recorded.get("manifest_sha256") != artifact.manifest_sha256:
        raise GateFailed(f"{artifact.path}: was not measured since it was built", "run check first")
    verdict = Verdict(recorded["verdict"], tuple(recorded["reasons"]))
    if verdict.outcome != "pass":
        raise GateFailed(
            f"{artifact.name}: the report's verdict is {verdict.outcome}; {'; '.join(verdict.reasons)}",
            "only a passing artifact is published; run check, or release",
        )
    return verify(artifact, verdict, Drift(**recorded["drift"]))
