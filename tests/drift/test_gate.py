from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_export.artifact import Artifact
from qlora_export.drift.gate import DEFAULT_LIMITS, Z_95, deciding_tokens, judge, verify
from qlora_export.drift.results import Drift, Verdict
from qlora_export.drift.statistics import Beside
from qlora_export.errors import VerifyMismatch
from qlora_export.recipe.config import Limits

PERFECT: dict[str, Any] = {
    "perplexity": 2.0,
    "perplexity_stderr": 0.1,
    "perplexity_reference": 2.0,
    "perplexity_reference_stderr": 0.1,
    "ln_ppl_ratio": 0.0,
    "ln_ppl_ratio_stderr": 0.001,
    "mean_kl": 0.0,
    "mean_kl_stderr": 0.001,
    "median_kl": 0.0,
    "kl_99": 0.0,
    "same_top1": 1.0,
    "same_top1_stderr": 0.001,
    "gain_kept": 1.0,
    "gain_kept_stderr": 0.001,
    "survival_median": 1.0,
    "survival_min": 1.0,
}


@pytest.mark.parametrize(
    ("changes", "outcome", "says"),
    [
        ({}, "pass", ""),
        ({"ln_ppl_ratio": 0.1}, "fail", "perplexity ratio is 1.105 ± 0.0011, the limit is at most 1.03"),
        ({"ln_ppl_ratio": -0.5}, "pass", ""),
        ({"mean_kl": 0.06}, "fail", "mean KL is 0.06"),
        ({"mean_kl": 0.051}, "inconclusive", "mean KL is 0.051"),
        ({"mean_kl": 0.049}, "inconclusive", "more tokens are needed"),
        ({"mean_kl": 0.05}, "inconclusive", "no number of tokens decides"),
        ({"same_top1": 0.9}, "fail", "same top-1 is 0.9"),
        ({"gain_kept": 0.5}, "fail", "gain kept is 0.5"),
        ({"gain_kept": None, "gain_kept_stderr": None}, "inconclusive", "the adapter is no better than its base"),
        ({"survival_min": 0.89}, "fail", "lowest survival is 0.89, the limit is at least 0.9"),
        ({"survival_min": 0.9}, "pass", ""),
        ({"survival_min": 0.1, "mean_kl": 0.051}, "fail", "lowest survival"),
    ],
)
def test_verdicts(changes: dict[str, Any], outcome: str, says: str) -> None:
    verdict = judge(Drift(**{**PERFECT, **changes}), DEFAULT_LIMITS, 1000, 0)
    assert verdict.outcome == outcome
    assert says in " ".join(verdict.reasons)
    assert (outcome == "pass") == (verdict.reasons == ())


def test_the_number_of_tokens_that_would_decide() -> None:
    drift = Drift(**{**PERFECT, "mean_kl": 0.049, "mean_kl_stderr": 0.001})
    (reason,) = judge(drift, DEFAULT_LIMITS, 1000, 0).reasons
    assert "about 6849 more tokens" in reason  # 1000 * ((1.96 + 0.84) * 0.001 / 0.001)^2 - 1000


def test_a_limit_that_is_off_judges_nothing() -> None:
    assert judge(Drift(**{**PERFECT, "mean_kl": 9.0}), Limits(), 1000, 0) == Verdict("pass")


def test_no_worse_than_another_artifact() -> None:
    limits = Limits(no_worse_than="bf16")
    assert limits.no_worse_than is not None
    assert (limits.no_worse_than.mean_kl, limits.no_worse_than.perplexity_ratio) == (1e-3, 1.002)
    drift, same = Drift(**PERFECT), Beside("bf16", 0.0, 1e-5, 0.0, 1e-5)
    assert judge(drift, limits, 1000, 0, same).outcome == "pass"
    worse = judge(drift, limits, 1000, 0, replace(same, mean_kl=0.002))
    assert worse.outcome == "fail"
    assert worse.reasons == ("mean KL above bf16 is 0.002 ± 1e-05, the limit is at most 0.001",)
    ratio = judge(drift, limits, 1000, 0, replace(same, ln_ppl_ratio=0.01))
    assert "perplexity ratio to bf16 is 1.01" in ratio.reasons[0]
    assert judge(drift, limits, 1000, 0, replace(same, mean_kl_stderr=0.01)).outcome == "inconclusive"


def test_the_predicted_tokens_decide_four_times_in_five() -> None:
    rng = np.random.default_rng(0)
    spread, distance = 0.4, 0.02
    needed = deciding_tokens(1000, spread / math.sqrt(1000), distance)
    means = distance + rng.normal(0, spread / math.sqrt(needed), 4000)
    decided = (np.abs(means) >= Z_95 * spread / math.sqrt(needed)).mean()
    assert decided == pytest.approx(0.8, abs=0.03)


def test_a_handful_of_tokens_decides_nothing() -> None:
    verdict = judge(Drift(**PERFECT), DEFAULT_LIMITS, 99, 0)
    assert verdict.outcome == "inconclusive"
    assert "99 tokens are too few" in verdict.reasons[0]
    assert judge(Drift(**{**PERFECT, "mean_kl": 1.0}), DEFAULT_LIMITS, 99, 0).outcome == "fail"


def test_nonfinite_logits_fail_whatever_the_average_says() -> None:
    verdict = judge(Drift(**PERFECT), Limits(), 1000, 3)
    assert verdict == Verdict("fail", ("3 tokens have a distribution with NaN or infinity",))


def test_a_manifest_that_changed_is_not_verified(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    drift, passed = Drift(**PERFECT), Verdict("pass")
    assert verify(Artifact("a", "bf16", tmp_path, {}, digest), passed, drift).verdict == passed
    (tmp_path / "manifest.json").write_text("{ }")
    with pytest.raises(VerifyMismatch, match="changed while it was measured"):
        verify(Artifact("a", "bf16", tmp_path, {}, digest), passed, drift)
