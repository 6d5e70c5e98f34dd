from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_export.errors import InputError, UsageError
from qlora_export.pipeline.clean import find_leftovers, remove_leftovers
from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.release import build, plan
from tests.helpers.files import edit_json
from tests.helpers.pico import RecipeMaker


@pytest.fixture
def auto(pico_recipe: RecipeMaker, pico_text: Path) -> dict[str, object]:
    return {"merge": {"onto": "auto"}, "drift": {"text": str(pico_text)}}


def test_the_better_merge_base_is_taken_with_its_numbers(
    pico_recipe: RecipeMaker, auto: dict[str, object], tmp_path: Path
) -> None:
    run = build(pico_recipe("nf4", **auto), RunOptions(tmp_path))
    decision = json.loads((tmp_path / "onto.json").read_text())
    assert decision["chosen"] == "as-trained"
    assert decision["mean_kl_nats"]["as-trained"] < decision["mean_kl_nats"]["original"] / 10
    assert run.plan.artifacts[0].onto == "as-trained"
    note = f"merge.onto auto: as-trained, by mean KL in nats on {decision['tokens']} tokens"
    assert any(text.startswith(note) for text in run.plan.assumptions)
    assert note in (tmp_path / "nf4/manifest.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nf4", "onto.json"]


def test_a_decision_is_kept_and_heeded(pico_recipe: RecipeMaker, auto: dict[str, object], tmp_path: Path) -> None:
    build(pico_recipe("bf16", **auto), RunOptions(tmp_path))
    edit_json(tmp_path / "onto.json", chosen="original")
    run = build(pico_recipe({"format": "bf16", "name": "other"}, **auto), RunOptions(tmp_path))
    assert run.plan.artifacts[0].onto == "original"


def test_auto_needs_something_to_measure(pico_recipe: RecipeMaker, auto: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs an adapter and a text"):
        build(pico_recipe("bf16", merge={"onto": "auto"}), RunOptions(tmp_path))
    notes = plan(pico_recipe("bf16", **auto), RunOptions(tmp_path)).plan.assumptions
    assert any("auto is settled when it is built" in note for note in notes)


def test_where_training_was_in_16_bits_there_is_one_base(
    pico_recipe: RecipeMaker, auto: dict[str, object], adapter_copy: Path, tmp_path: Path
) -> None:
    (adapter_copy / "qlora_export.json").unlink()
    recipe = pico_recipe("bf16", **auto, adapter=str(adapter_copy), training_quantization="none")
    run = build(recipe, RunOptions(tmp_path))
    assert "merge.onto auto: there is one base only, as stored" in run.plan.assumptions
    assert not (tmp_path / "onto.json").exists()


def test_a_damaged_decision_is_measured_again(
    pico_recipe: RecipeMaker, auto: dict[str, object], tmp_path: Path
) -> None:
    build(pico_recipe("bf16", **auto), RunOptions(tmp_path))
    whole = json.loads((tmp_path / "onto.json").read_text())
    for content in ('{"inputs": "', json.dumps({"inputs": whole["inputs"]}), "[]"):
        (tmp_path / "onto.json").write_text(content)
        build(pico_recipe("bf16", **auto), RunOptions(tmp_path))
        assert json.loads((tmp_path / "onto.json").read_text()) == whole


def test_a_plan_says_what_auto_lacks(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs an adapter and a text"):
        plan(pico_recipe("bf16", merge={"onto": "auto"}), RunOptions(tmp_path))
    with pytest.raises(InputError, match="nothing.jsonl"):
        lacking = {"merge": {"onto": "auto"}, "drift": {"text": "nothing.jsonl"}}
        plan(pico_recipe("bf16", **lacking), RunOptions(tmp_path))


def test_a_trial_that_was_killed_is_found_and_removed(tmp_path: Path) -> None:
    (tmp_path / "onto-trial/bf16.partial").mkdir(parents=True)
    (tmp_path / "combined-adapter-0123.partial").mkdir()
    (tmp_path / "other.partial").mkdir()
    found = find_leftovers(tmp_path)
    assert [item.path.name for item in found] == ["combined-adapter-0123.partial", "onto-trial"]
    remove_leftovers(tmp_path, found)
    assert [path.name for path in tmp_path.iterdir()] == ["other.partial"]
