"""What people read of single layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest

from qlora_export.drift.layers import KeptLayer
from qlora_export.drift.results import Verdict
from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.release import check
from qlora_export.recipe.load import make_recipe
from qlora_export.report.data import report
from qlora_export.report.layers import lowest_line
from qlora_export.report.markdown import markdown
from qlora_export.report.run import Run
from qlora_export.report.schemas import report_schema
from qlora_export.report.terminal import print_ledger


@pytest.fixture(scope="module")
def run(pico_base: Path, pico_adapter: Path, pico_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two artifacts whose weights were read back, one that lost layers and is not judged by them."""
    nearest = {"format": "nf4", "name": "nf4", "rounding": "nearest", "limits": {"survival_min": None}}
    data = {
        "base": str(pico_base),
        "adapter": str(pico_adapter),
        "artifacts": ["bf16", nearest],
        "drift": {"text": str(pico_text)},
    }
    return check(make_recipe(data, Path(), "test"), RunOptions(tmp_path_factory.mktemp("layers")))


def test_the_report_has_every_layer(run: Run) -> None:
    data = report(run)
    jsonschema.Draft202012Validator(report_schema()).validate(data)
    dense, rounded = data["artifacts"]
    for artifact in (dense, rounded):
        assert len(artifact["layers"]) == 14
        assert {layer["tensor"]: layer["survival"] for layer in artifact["layers"]} == artifact["survival"]
    least = min(rounded["layers"], key=lambda layer: layer["survival"])
    assert rounded["drift"]["survival_min"] == least["survival"] < 0.9
    assert rounded["drift"]["survival_min_tensor"] == least["tensor"]
    assert 0 < rounded["drift"]["codes_changed_median"] < 1
    assert dense["drift"]["codes_changed_median"] is None
    assert dense["layers"][0]["codes_changed"] is None
    assert {layer["weighted_of"] for layer in rounded["layers"]} == {None}


def test_markdown_has_the_five_lowest_of_quantised_weights(run: Run) -> None:
    rows = markdown(run).split("## Layers")[1].splitlines()[4:]
    assert run.ledger is not None
    expected = sorted(run.ledger.entries[1].layers, key=lambda layer: layer.survival)[:5]
    assert [row.split("|")[2].strip(" `") for row in rows] == [layer.tensor for layer in expected]
    assert rows[0].startswith(f"| `nf4` | `{expected[0].tensor}` | {expected[0].survival:.1%} | ")
    assert "bf16" not in "".join(rows)


def test_the_terminal_names_the_lowest_layer_that_no_limit_names(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    print_ledger(run)
    least = report(run)["artifacts"][1]["drift"]
    line = f"nf4: lowest survival is {least['survival_min']:.4g} in {least['survival_min_tensor']}\n"
    assert line in capsys.readouterr().out
    assert run.ledger is not None
    dense, entry = run.ledger.entries
    assert lowest_line(dense) is None
    reason = f"lowest survival is 0.1 in {least['survival_min_tensor']}, the limit is at least 0.9"
    assert lowest_line(replace(entry, verdict=Verdict("fail", (reason,)))) is None
    assert lowest_line(replace(entry, layers=())) is None


def test_the_lowest_layer_is_told_with_what_calibration_found(run: Run) -> None:
    assert run.ledger is not None
    layers = (KeptLayer("a", 1.2), KeptLayer("b", 0.75, 0.5, 0.992, 0.02, "shipped"))
    entry = replace(run.ledger.entries[1], layers=layers)
    assert lowest_line(entry) == "lowest survival is 0.75 in b, 99.2% in its outputs"
    tuned = replace(layers[1], weighted_of="before tuning")
    assert lowest_line(replace(entry, layers=(tuned,))) == (
        "lowest survival is 0.75 in b, 99.2% before tuning in its outputs"
    )
    ledger = replace(run.ledger, entries=(replace(entry, layers=(tuned,)),))
    assert markdown(replace(run, ledger=ledger)).endswith(
        "| `nf4` | `b` | 75.0% | 50.00% | 99.2% before tuning | 2.00% before tuning |\n"
    )
