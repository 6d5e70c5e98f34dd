from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_export.errors import InputError, PlanRefused, UsageError
from qlora_export.pipeline.auto_format import resolve_auto_formats
from qlora_export.pipeline.doctor.recipe_checks import with_resolved_formats
from qlora_export.pipeline.lock import pinned_recipe, pins, require_pinned
from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.release import build, plan
from qlora_export.recipe.config import Recipe
from tests.helpers.pico import RecipeMaker


def chosen(recipe: Recipe, out: Path) -> tuple[str, str, str | None, str]:
    item = resolve_auto_formats(recipe, out).artifacts[0]
    return item.name, item.format, item.rounding, item.why


def auto(**options: Any) -> dict[str, Any]:
    return {"format": "auto", "options": options}


def test_a_runtime_that_takes_adapters_gets_the_base_as_it_was(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    name, form, rounding, why = chosen(pico_recipe(auto(adapters=True)), tmp_path)
    assert (name, form, rounding) == ("nf4-adapter", "nf4-adapter", None)
    assert why == "format auto: nf4-adapter: its runtime takes adapters, so nothing is rounded"


def test_without_adapters_bits_and_text_decide(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    assert chosen(pico_recipe(auto(bits=8)), tmp_path)[:3] == ("int8", "int8", None)
    assert chosen(pico_recipe("auto"), tmp_path)[:3] == ("nf4", "nf4", None)
    with_text = pico_recipe(auto(adapters=False, bits=4), calibration={"text": "sample.jsonl"})
    assert chosen(with_text, tmp_path)[:3] == ("nf4-calibrated", "nf4", "calibrated")
    assert chosen(pico_recipe(auto(adapters=True), adapter=None), tmp_path)[1] == "nf4"


def test_an_adapter_trained_on_16_bits_is_merged(pico_recipe: RecipeMaker, adapter_copy: Path, tmp_path: Path) -> None:
    (adapter_copy / "qlora_export.json").unlink()
    recipe = pico_recipe(auto(adapters=True), adapter=str(adapter_copy), training_quantization="none")
    name, _, _, why = chosen(recipe, tmp_path)
    assert name == "nf4"
    assert "its base was trained on as none, so the adapter cannot stay beside an nf4 base; 4 bits a weight" in why


def test_a_name_and_a_reason_of_its_own_are_kept(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    stated = {**auto(bits=8), "name": "small", "why": "for laptops"}
    name, form, _, why = chosen(pico_recipe(stated), tmp_path)
    assert (name, form) == ("small", "int8")
    assert why == "for laptops; format auto: int8: 8 bits a weight are allowed"
    both = resolve_auto_formats(pico_recipe(auto(bits=8), "int8"), tmp_path)
    assert [(item.name, item.format) for item in both.artifacts] == [("auto", "int8"), ("int8", "int8")]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (auto(bits=5), "auto cannot have adapters False and bits 5"),
        (auto(bits=True), "auto cannot have adapters False and bits True"),
        (auto(adapters="yes"), "auto cannot have adapters 'yes' and bits 4"),
        (auto(group_size=64), "auto has no option 'group_size'"),
        ({"format": "auto", "rounding": "nearest"}, "auto chooses the rounding, it cannot have a rounding"),
    ],
)
def test_what_auto_cannot_have_is_refused(
    item: dict[str, Any], message: str, pico_recipe: RecipeMaker, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        plan(pico_recipe(item), RunOptions(tmp_path))


def test_plan_manifest_and_report_name_the_format_and_why(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    run = build(pico_recipe(auto(adapters=True), "bf16"), RunOptions(tmp_path))
    assert [artifact.name for artifact in run.artifacts] == ["nf4-adapter", "bf16"]
    note = "nf4-adapter: format auto: nf4-adapter: its runtime takes adapters, so nothing is rounded"
    assert note in run.plan.assumptions
    manifest = json.loads((tmp_path / "nf4-adapter/manifest.json").read_text())
    assert manifest["format"] == "nf4-adapter"
    assert note in manifest["assumptions"]


def test_a_kept_plan_keeps_what_was_chosen(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    planned = plan(pico_recipe(auto(bits=8)), RunOptions(tmp_path)).plan
    (tmp_path / "plan.json").write_text(json.dumps(pins(planned, 1)))
    recipe, pinned = pinned_recipe(tmp_path / "plan.json")
    assert recipe.artifacts[0].format == "int8"
    require_pinned(plan(recipe, RunOptions(tmp_path)).plan, pinned)


def test_sources_that_do_not_open_are_told_by_the_plan(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    recipe = pico_recipe(auto(adapters=True), base=str(tmp_path / "nothing"))
    with pytest.raises((PlanRefused, InputError), match="nothing"):
        plan(recipe, RunOptions(tmp_path / "out"))


def test_doctor_settles_what_needs_no_hub(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    assert with_resolved_formats(pico_recipe(auto(bits=8)), tmp_path).artifacts[0].format == "int8"
    remote = pico_recipe(auto(bits=8), base="acme/base")
    assert with_resolved_formats(remote, tmp_path) is remote
    wrong = pico_recipe(auto(bits=5))
    assert with_resolved_formats(wrong, tmp_path) is wrong
