from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlora_export
from qlora_export.drift.comparison.rows import Comparison
from qlora_export.errors import InputError, PlanRefused, UsageError
from qlora_export.pipeline.clean import find_leftovers, remove_leftovers
from qlora_export.pipeline.compare import compare
from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.release import check
from qlora_export.recipe.config import Recipe
from tests.helpers.compared import compared, compared_recipe, timed_once
from tests.helpers.files import edit_json

__all__ = ["compared", "compared_recipe"]


@pytest.fixture(autouse=True)
def hasty() -> Iterator[None]:
    with timed_once():
        yield


def trial_of(comparison: Comparison) -> Path:
    return next(row.measured.entry.artifact.path.parent for row in comparison.rows if row.measured)


def changed(recipe: Recipe, **keys: object) -> Recipe:
    return recipe.model_copy(update=keys)


def test_rows_are_what_a_check_measures(compared: Comparison, compared_recipe: Recipe, tmp_path: Path) -> None:
    run = check(compared_recipe, RunOptions(tmp_path))
    assert run.ledger is not None
    found = next(row.measured for row in compared.rows if row.name == "bf16")
    assert found is not None
    assert found.entry.drift == run.ledger.entries[0].drift
    assert found.entry.verdict == run.ledger.entries[0].verdict
    assert compared.tokens.sha256 == run.ledger.tokens.sha256
    assert compared.merged == run.ledger.merged


def test_what_cannot_be_made_is_a_row_with_its_reason(compared: Comparison) -> None:
    reasons = {row.name: row.reason for row in compared.rows if row.measured is None}
    assert set(reasons) == {"nf4-calibrated", "w4a16"}
    assert reasons["nf4-calibrated"] == "calibrated needs a text to calibrate on"
    assert (reasons["w4a16"] or "").startswith("w4a16 cannot hold")


def test_a_second_comparison_builds_nothing(compared: Comparison, compared_recipe: Recipe, tmp_path: Path) -> None:
    trial = Path(shutil.copytree(trial_of(compared), tmp_path / "compare-trial"))
    before = {path: path.stat().st_mtime_ns for path in trial.rglob("*.safetensors")}
    found = compare(compared_recipe, RunOptions(tmp_path), ["bf16,int8"])
    assert {path: path.stat().st_mtime_ns for path in trial.rglob("*.safetensors")} == before
    assert all(row.measured and row.measured.entry.artifact.reused for row in found.rows)
    assert [row.measured.prefill_ratio for row in found.rows if row.measured] == [None, None]


def test_what_a_recipe_asks_beside_its_text_is_not_read(
    compared: Comparison, compared_recipe: Recipe, tmp_path: Path
) -> None:
    shutil.copytree(trial_of(compared) / "bf16", tmp_path / "compare-trial/bf16")
    assert compared_recipe.drift is not None
    drift = compared_recipe.drift.model_copy(update={"choices": "nowhere.jsonl"})
    found = compare(changed(compared_recipe, drift=drift), RunOptions(tmp_path), ["bf16"])
    assert [row.reason for row in found.rows] == [None]


def test_what_another_plan_left_makes_room(compared: Comparison, compared_recipe: Recipe, tmp_path: Path) -> None:
    trial = tmp_path / "compare-trial"
    shutil.copytree(trial_of(compared) / "bf16", trial / "bf16")
    edit_json(trial / "bf16/manifest.json", plan_digest="0" * 64)
    (trial / "int8.partial").mkdir()
    (trial / "int8.partial/.journal").write_text('{"plan": "' + "1" * 64 + '"}\n')
    found = compare(compared_recipe, RunOptions(tmp_path), ["bf16,int8"])
    assert all(row.measured and not row.measured.entry.artifact.reused for row in found.rows)


def test_a_damaged_artifact_is_a_row_with_its_reason(
    compared: Comparison, compared_recipe: Recipe, tmp_path: Path
) -> None:
    trial = tmp_path / "compare-trial"
    shutil.copytree(trial_of(compared) / "bf16", trial / "bf16")
    (trial / "bf16/config.json").write_text("{}")
    found = compare(compared_recipe, RunOptions(tmp_path), ["bf16,int8"])
    reasons = {row.name: row.reason for row in found.rows}
    assert reasons["int8"] is None
    assert "config.json" in (reasons["bf16"] or "")


def test_what_is_wrong_with_every_row_is_an_error(compared_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises((PlanRefused, InputError), match="nothing"):
        compare(changed(compared_recipe, base=str(tmp_path / "nothing")), RunOptions(tmp_path / "out"))
    with pytest.raises(PlanRefused, match="calibrated needs a text"):
        compare(compared_recipe, RunOptions(tmp_path / "out"), ["nf4:calibrated"])
    with pytest.raises(UsageError, match=r"no drift.text to measure on"):
        compare(changed(compared_recipe, drift=None), RunOptions(tmp_path / "out"))


def test_a_trial_that_is_a_link_is_refused(compared_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "compare-trial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="compare-trial: is a link"):
        compare(compared_recipe, RunOptions(tmp_path), ["bf16"])


def test_clean_removes_the_trial(tmp_path: Path) -> None:
    (tmp_path / "compare-trial/bf16").mkdir(parents=True)
    found = find_leftovers(tmp_path)
    assert [item.path.name for item in found] == ["compare-trial"]
    remove_leftovers(tmp_path, found)
    assert list(tmp_path.iterdir()) == []


def test_it_is_public() -> None:
    assert qlora_export.compare is compare
    assert qlora_export.Comparison is Comparison
