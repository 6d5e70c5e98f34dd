from __future__ import annotations

import copy
from typing import Any
from xml.etree import ElementTree

import pytest

from qlora_export.report.junit import junit

DRIFT = {
    "perplexity": 2.1, "perplexity_stderr": 0.01, "perplexity_reference": 2.0, "perplexity_reference_stderr": 0.01,
    "ln_ppl_ratio": 0.01, "ln_ppl_ratio_stderr": 0.001, "mean_kl": 0.01, "mean_kl_stderr": 0.001, "median_kl": 0.001,
    "kl_99": 0.1, "same_top1": 0.99, "same_top1_stderr": 0.001, "gain_kept": 0.99, "gain_kept_stderr": 0.001,
    "survival_median": 0.99, "survival_min": 0.95,
}  # fmt: skip
LIMITS = {"perplexity_ratio": 1.03, "mean_kl": 0.05, "same_top1": 0.95, "gain_kept": None, "survival_min": 0.9}


def artifact(**changes: Any) -> dict[str, Any]:
    facts = {"name": "bf16", "verdict": "pass", "expected": "pass", "reasons": [], "manifest_sha256": "a" * 64}
    return {**facts, "limits": dict(LIMITS), "drift": dict(DRIFT), **changes}


def report(*artifacts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"tokens": {"count": 5000}, "artifacts": list(artifacts), "published": [], "exit_code": 0, **changes}


def failing(**changes: Any) -> dict[str, Any]:
    reasons = ["mean KL is 0.2 ± 0.001, the limit is at most 0.05"]
    return artifact(**{"verdict": "fail", "reasons": reasons, "drift": {**DRIFT, "mean_kl": 0.2}, **changes})


def cases(data: dict[str, Any]) -> dict[tuple[str, str], ElementTree.Element | None]:
    suite = ElementTree.fromstring(junit(data))[0]
    assert suite.get("tests") == str(len(suite))
    for outcome, plural in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        assert suite.get(plural) == str(len(suite.findall(f"testcase/{outcome}")))
    return {(str(case.get("classname")), str(case.get("name"))): next(iter(case), None) for case in suite}


def test_one_case_for_each_artifact_and_limit() -> None:
    found = cases(report(artifact(), artifact(name="nf4"), published=[{"artifact": "bf16"}]))
    assert [name for group, name in found if group == "qlora-export.nf4"] == [
        "perplexity ratio", "mean KL", "same top-1", "lowest survival",
    ]  # fmt: skip
    assert len(found) == 9
    assert ("qlora-export.publication", "bf16") in found
    assert set(found.values()) == {None}


def test_a_failure_says_the_number_and_the_limit() -> None:
    found = cases(report(failing(), exit_code=3))
    failure = found.pop(("qlora-export.bf16", "mean KL"))
    assert failure is not None
    assert (failure.tag, failure.get("type")) == ("failure", "fail")
    assert failure.get("message") == "mean KL is 0.2 ± 0.001, the limit is at most 0.05"
    assert set(found.values()) == {None}, "the reason is told once"


def test_a_number_that_is_not_exact_enough_is_told_apart() -> None:
    drift = {**DRIFT, "mean_kl": 0.0501, "mean_kl_stderr": 0.01}
    found = cases(report(artifact(verdict="inconclusive", drift=drift), exit_code=11))
    case = found[("qlora-export.bf16", "mean KL")]
    assert case is not None
    assert case.get("type") == "inconclusive"
    assert "more tokens are needed" in str(case.get("message"))


def test_an_expected_failure_and_a_withheld_artifact_are_skipped_with_their_reason() -> None:
    for item, why in ((failing(expected="fail"), "as the recipe expects"), (failing(), "withheld")):
        case = cases(report(item))[("qlora-export.bf16", "mean KL")]
        assert case is not None
        assert case.tag == "skipped"
        assert str(case.get("message")).startswith(f"{why}: mean KL is 0.2")


def test_an_artifact_that_should_have_failed() -> None:
    case = cases(report(artifact(expected="fail"), exit_code=3))[("qlora-export.bf16", "expected")]
    assert case is not None
    assert case.get("message") == "the verdict is pass, the recipe expects it to fail"


def test_reasons_that_are_no_limit_and_numbers_that_are_not_finite() -> None:
    reason = "12 tokens have a distribution with NaN or infinity"
    broken = artifact(verdict="fail", reasons=[reason], drift={**DRIFT, "mean_kl": None})
    assert [case.get("message") for case in cases(report(broken, exit_code=3)).values() if case is not None] == [reason]
    unmeasured: dict[str, Any] = {"name": "bf16", "verdict": "not-measured", "reasons": [], "drift": None}
    case = cases(report(unmeasured))[("qlora-export.bf16", "verdict")]
    assert case is not None
    assert case.tag == "skipped"


def test_what_stopped_the_run_is_an_error() -> None:
    data = {"schema": 1, "exit_code": 9, "error": {"message": "acme/bot: 401", "hint": "set HF_TOKEN"}}
    case = cases(data)[("qlora-export.run", "finished")]
    assert case is not None
    assert (case.tag, case.get("type"), case.text) == ("error", "not-authorised", "acme/bot: 401\nhint: set HF_TOKEN")
    case = cases(report(artifact(), exit_code=7))[("qlora-export.run", "finished")]
    assert case is not None
    assert "exit code 7, remote" in str(case.text)
    assert ("qlora-export.run", "finished") not in cases(report(failing(), exit_code=3))


@pytest.mark.parametrize("text", ["a\x00b\x1b[31m", "\ud800", "\ufffe", '<&"]]>'])
def test_whatever_a_name_holds_the_document_can_be_read(text: str) -> None:
    data = report(artifact(name=f"x{text}", verdict="fail", reasons=[f"y{text}"]), exit_code=3)
    before = copy.deepcopy(data)
    (group, _), *_ = cases(data)
    assert group.startswith("qlora-export.x")
    assert data == before
    assert junit(data).encode()
