from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qlora_export.engine import BuildOptions, build
from qlora_export.errors import ExitCode, PlanRefused
from qlora_export.planning.make import make_plan
from qlora_export.report.data import plan_summary
from tests.helpers.files import edit_json, edit_tensors
from tests.helpers.pico import RecipeMaker, save_base


def refused(recipe: Any, out: Path) -> PlanRefused:
    with pytest.raises(PlanRefused) as caught:
        make_plan(recipe, out)
    return caught.value


def test_every_planned_byte_is_what_the_build_writes(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    plan = make_plan(pico_recipe("bf16", "nf4", "nf4-adapter", shard_bytes=200_000), tmp_path)
    build(plan, tmp_path, BuildOptions())
    for item in plan_summary(plan, 1)["artifacts"]:
        on_disk = {
            str(path.relative_to(tmp_path / item["name"])): path.stat().st_size
            for path in (tmp_path / item["name"]).rglob("*")
            if path.is_file()
        }
        del on_disk["manifest.json"]
        assert on_disk == item["files"]
        assert item["bytes"] == sum(on_disk.values())


def test_a_plan_reads_no_weight(pico_recipe: RecipeMaker, base_copy: Path, tmp_path: Path) -> None:
    """A sparse file of the right length is enough to plan."""
    path = base_copy / "model.safetensors"
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    path.write_bytes(raw[:header])
    with path.open("r+b") as file:
        file.truncate(len(raw))
    assert make_plan(pico_recipe("nf4", base=str(base_copy)), tmp_path).bytes > 0


def test_an_adapter_for_another_base_is_refused(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=1, hidden_size=128)
    error = refused(pico_recipe("bf16", base=str(other)), tmp_path / "out")
    assert error.exit_code == ExitCode.BAD_INPUT
    assert "the adapter was trained on" in error.message
    assert "q_proj.lora_A.weight is [4, 64], the base and r need [4, 128]" in error.message


def test_all_problems_come_at_once(
    pico_recipe: RecipeMaker, adapter_copy: Path, base_copy: Path, tmp_path: Path
) -> None:
    edit_json(adapter_copy / "adapter_config.json", kasa_config={"beta": 1}, rank_pattern={"layers.1.mlp.up_proj": 3})
    edit_json(adapter_copy / "qlora_export.json", base={"headers_sha256": "0" * 64})
    edit_json(base_copy / "config.json", quantization_config={"quant_method": "gptq"})
    edit_tensors(adapter_copy / "adapter_model.safetensors", lambda t: t.update(stray=next(iter(t.values())).clone()))
    recipe = pico_recipe({"format": "nf4", "keep": ["nothing.*"]}, base=str(base_copy), adapter=str(adapter_copy))
    error = refused(recipe, tmp_path / "out")
    for says in (
        "KaSA",
        "base and r need [3, 64]",
        "000000000000",
        "stored in gptq",
        "tensor stray has no home",
        "nothing.*",
    ):
        assert says in error.message
    assert len(error.problems) == 6
    assert not (tmp_path / "out").exists()


def test_both_sources_missing(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    error = refused(pico_recipe("bf16", base=str(tmp_path / "b"), adapter=str(tmp_path / "a")), tmp_path)
    assert len(error.problems) == 2


def test_no_room_on_the_disk(pico_recipe: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000))
    error = refused(pico_recipe("bf16"), tmp_path / "out")
    assert error.exit_code == ExitCode.ENVIRONMENT
    assert "the disk has 1000 free" in error.message


def test_assumptions_are_stated(pico_recipe: RecipeMaker, adapter_copy: Path, tmp_path: Path) -> None:
    assert make_plan(pico_recipe("bf16"), tmp_path).assumptions == ()
    (adapter_copy / "qlora_export.json").unlink()
    (assumption,) = make_plan(pico_recipe("bf16", adapter=str(adapter_copy)), tmp_path).assumptions
    assert "no sidecar: assumed nf4 in blocks of 64 with double quantisation" in assumption


def test_without_a_sidecar_the_same_modules_are_found(
    pico_recipe: RecipeMaker, adapter_copy: Path, tmp_path: Path
) -> None:
    recorded = make_plan(pico_recipe("bf16"), tmp_path)
    (adapter_copy / "qlora_export.json").unlink()
    assumed = make_plan(pico_recipe("bf16", adapter=str(adapter_copy)), tmp_path)
    assert assumed.training.quantised == recorded.training.quantised


def test_the_digest_changes_with_what_decides_the_bytes(
    pico_recipe: RecipeMaker, adapter_copy: Path, base_copy: Path, tmp_path: Path
) -> None:
    def digest(*formats: Any, **changes: Any) -> str:
        return make_plan(pico_recipe(*formats, **changes), tmp_path).artifacts[0].digest

    first = digest("bf16")
    assert digest("bf16", "nf4", drift={"text": "x"}) == first
    edit_json(base_copy / "generation_config.json", temperature=0.5)
    edit_json(adapter_copy / "adapter_config.json", lora_alpha=9)
    others = [
        digest("fp32"),
        digest("bf16", merge={"onto": "original"}),
        digest("bf16", shard_bytes=200_000),
        digest("bf16", base=str(base_copy)),
        digest("bf16", adapter=str(adapter_copy)),
    ]
    assert len({first, *others}) == 6


def test_the_summary_is_json(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    summary = plan_summary(make_plan(pico_recipe("bf16", "nf4"), tmp_path), 2)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["adapted_tensors"] == 14
    assert summary["peak_memory_bytes"] < 1 << 30


@pytest.mark.parametrize(
    ("artifact", "says"),
    [
        ({"format": "nf4-adapter", "onto": "original"}, "ships the base of training as it was"),
        ({"format": "nf4-adapter", "keep": ["*.mlp.*"]}, "ships the base of training as it was"),
        ({"format": "bf16", "keep": ["*.mlp.*"]}, "quantises nothing"),
    ],
)
def test_what_a_format_cannot_do_is_said(
    pico_recipe: RecipeMaker, tmp_path: Path, artifact: dict[str, Any], says: str
) -> None:
    error = refused(pico_recipe(artifact), tmp_path)
    assert error.exit_code == ExitCode.USAGE
    assert says in error.message


def test_the_kept_base_is_that_of_training_whatever_the_others_are_merged_onto(
    pico_recipe: RecipeMaker, tmp_path: Path
) -> None:
    plan = make_plan(pico_recipe("bf16", "nf4-adapter", merge={"onto": "original"}), tmp_path)
    assert [item.onto for item in plan.artifacts] == ["original", "as-trained"]


@pytest.mark.parametrize("place", ["base", "base/deeper", "adapter"])
def test_a_run_folder_in_a_source_is_refused(
    pico_recipe: RecipeMaker, base_copy: Path, adapter_copy: Path, place: str
) -> None:
    recipe = pico_recipe("bf16", base=str(base_copy), adapter=str(adapter_copy))
    error = refused(recipe, base_copy.parent / place)
    assert error.exit_code == ExitCode.USAGE
    assert "lies in the source" in error.message


@pytest.mark.parametrize("section", [{"quant_method": "gptq"}, "nf4"])
def test_a_nested_quantisation_is_seen(pico_recipe: RecipeMaker, base_copy: Path, tmp_path: Path, section: Any) -> None:
    edit_json(base_copy / "config.json", text_config={"quantization_config": section})
    error = refused(pico_recipe("bf16", base=str(base_copy)), tmp_path)
    assert error.exit_code == ExitCode.REFUSED
    assert "(text_config)" in error.message


def test_a_scale_of_zero_is_refused(pico_recipe: RecipeMaker, adapter_copy: Path, tmp_path: Path) -> None:
    edit_json(adapter_copy / "adapter_config.json", lora_alpha=0)
    assert "the scale of model.layers.0" in refused(pico_recipe("bf16", adapter=str(adapter_copy)), tmp_path).message
