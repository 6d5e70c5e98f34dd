from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_export.report.github import CUT, SUMMARY_BYTES, announce, dotenv, error_lines, outputs, step_summary
from tests.report.test_junit import DRIFT, artifact, failing, report

RECEIPT = {
    "artifact": "bf16",
    "destination": "hub:acme/bot",
    "commit": "c" * 40,
    "files": {"config.json": "d" * 64},
    "url": "https://huggingface.co/acme/bot",
    "revision": "v1",
}


def test_a_summary_is_cut_at_the_end_of_a_line() -> None:
    assert step_summary("# Short\n") == "# Short\n"
    line = "| ü | one row of a table |\n"
    cut = step_summary(line * (SUMMARY_BYTES // 10))
    assert SUMMARY_BYTES - 100 < len(cut.encode()) <= SUMMARY_BYTES
    assert cut.endswith(CUT)
    assert set(cut.removesuffix(CUT).splitlines(keepends=True)) == {line}
    whole = step_summary("ü" * SUMMARY_BYTES)
    assert len(whole.encode()) <= SUMMARY_BYTES
    assert whole.startswith("üü")


def test_outputs_of_a_publication() -> None:
    worse = artifact(name="nf4", drift={**DRIFT, "mean_kl": 0.03})
    unpublished = artifact(name="other", drift={**DRIFT, "mean_kl": 0.9})
    receipts = [RECEIPT, {"artifact": "nf4", "destination": "folder", "commit": "e" * 64, "files": {}}]
    found = outputs(report(artifact(), worse, unpublished, published=receipts), Path("out/report.json"))
    published = json.loads(found.pop("published"))
    assert [item["url"] for item in published] == [RECEIPT["url"], None]
    assert found == {
        "commit_oid": "c" * 40,
        "repo_url": RECEIPT["url"],
        "mean_kl": "0.03",
        "manifest_sha256": "a" * 64,
        "report": "out/report.json",
    }


def test_outputs_where_nothing_was_published() -> None:
    found = outputs(report(artifact(), failing(name="nf4")))
    assert (found["commit_oid"], found["mean_kl"], found["published"]) == ("", "0.01", "[]")
    assert set(outputs({"exit_code": 9, "error": {"message": "no", "hint": ""}}).values()) == {"", "[]"}


def test_no_value_begins_a_line_of_its_own() -> None:
    receipt = {**RECEIPT, "commit": "c\nrepo_url=https://evil", "url": "u\r\u2028v"}
    found = outputs(report(artifact(), published=[receipt]))
    assert all(len(value.splitlines()) <= 1 for value in found.values())


def test_errors_are_escaped_and_ten_at_most() -> None:
    lines = error_lines(report(failing(name="a:b,c", reasons=["50% off\nmore"]), exit_code=3))
    assert lines == ["::error title=a%3Ab%2Cc%3A fail::50%25 off%0Amore"]
    many = [failing(name=f"n{index}") for index in range(30)]
    lines = error_lines(report(*many, exit_code=3))
    assert len(lines) == 10
    assert lines[-1] == "::error title=21 more::they are in report.md of the run folder"
    assert error_lines(report(failing(expected="fail"))) == []
    assert error_lines(report(failing())) == [], "withheld"
    data = {"exit_code": 9, "error": {"message": "acme/bot: 401", "hint": "set HF_TOKEN"}}
    assert error_lines(data) == ["::error title=exit code 9::acme/bot: 401%0Ahint: set HF_TOKEN"]


def test_announcing_appends_where_the_environment_asks(tmp_path: Path) -> None:
    data = report(failing(), exit_code=3)
    assert announce(data, "# Report\n", None, {}) == []
    environment = {
        "GITHUB_ACTIONS": "true",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
        "GITHUB_OUTPUT": str(tmp_path / "output"),
        "QLORA_EXPORT_DOTENV": str(tmp_path / "dotenv"),
    }
    (tmp_path / "output").write_text("earlier=1\n")
    assert len(announce(data, "# Report\n", Path("r.json"), environment)) == 1
    assert (tmp_path / "summary").read_text() == "# Report\n"
    lines = (tmp_path / "output").read_text().splitlines()
    assert lines[0] == "earlier=1"
    assert "report=r.json" in lines
    assert (tmp_path / "dotenv").read_text() == "QLORA_EXPORT_REPORT=r.json\n"


@pytest.mark.parametrize("name", ["commit_oid", "mean_kl"])
def test_dotenv_leaves_out_what_is_empty_and_what_is_json(name: str) -> None:
    values = {"commit_oid": "", "mean_kl": "", "published": "[1]", name: "7"}
    assert dotenv(values) == f"QLORA_EXPORT_{name.upper()}=7\n"
