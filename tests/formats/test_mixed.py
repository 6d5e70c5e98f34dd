"""One folder of several formats: every layer has the bytes of its own, and the library finds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import match_targets

from qlora_export.drift.survival import survival
from qlora_export.engine import BuildOptions, build
from qlora_export.errors import PlanRefused, UsageError
from qlora_export.formats.mixed import mix
from qlora_export.formats.registry import load_format
from qlora_export.planning.make import make_plan
from qlora_export.publish.lint.quantisation import quantisation_problems
from qlora_export.recipe.load import make_recipe
from qlora_export.runtimes.loading import decompress, load_model
from qlora_export.tensors.header import read_header
from qlora_export.types import TrainingQuantization
from tests.formats.test_folders import decoded
from tests.helpers.pico import RecipeMaker

GROUPS = {"group_size": 32}
OVERRIDES = {"*.layers.0.*_proj": {"format": "w4a16", "options": GROUPS}, "*.v_proj": "w8a16", "*.o_proj": "fp8"}
KEPT = ["*.down_proj"]
MIXED = {"format": "w4a16", "name": "mixed", "options": GROUPS, "keep": KEPT, "overrides": OVERRIDES}
ALONE = [{"format": name, "name": name, "keep": KEPT} for name in ("w8a16", "fp8")]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixed")


def test_every_layer_has_the_bytes_of_its_own_format(
    pico_recipe: RecipeMaker, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan(pico_recipe(MIXED, *ALONE), out)
    artifact = build(plan, out, BuildOptions())[0]
    item = plan.artifacts[0]
    other = {found.form.name: found for found in plan.artifacts[1:]}
    shipped = load_model(out / "mixed", dtype="auto")
    decompress(shipped)
    assert not caplog.records, "opens without a warning"
    counts = {"w4a16": 0, "w8a16": 0, "fp8": 0}
    for name, route in item.routes.items():
        if route.form is None or not route.form.quantises:
            continue
        form = route.form
        counts[form.name] += 1
        values = decoded(route.form, route.spec, out / "mixed")
        assert torch.equal(shipped.get_parameter(name).float(), values), name
        if form.name in other:
            same = other[form.name].routes[name]
            assert same.form is not None
            assert torch.equal(values, decoded(same.form, same.spec, out / form.name)), name
    assert counts == {"w4a16": 10, "w8a16": 1, "fp8": 1}, "the first pattern that matches decides"
    assert all(0.8 < value < 1.2 for value in survival(plan, item, artifact).values())


def test_the_library_finds_the_format_of_each_layer(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    plan = make_plan(pico_recipe(MIXED), tmp_path / "out")
    item = plan.artifacts[0]
    stated = item.form.quantization_config(["lm_head"])
    assert stated is not None
    assert stated["format"] == "mixed-precision"
    config = QuantizationConfig.model_validate(stated)
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    bits = {}
    for name, route in item.routes.items():
        if route.form is not None and route.form.quantises:
            module = name.removesuffix(".weight")
            found = match_targets(module, torch.nn.Linear(1, 1), schemes)
            assert found, name
            bits[module] = (schemes[found[0]].weights.num_bits, schemes[found[0]].weights.type)
    assert bits["model.layers.0.self_attn.v_proj"] == (4, "int")
    assert bits["model.layers.1.self_attn.v_proj"] == (8, "int")
    assert bits["model.layers.1.self_attn.o_proj"] == (8, "float")
    assert bits["model.layers.1.self_attn.q_proj"] == (4, "int")


def test_the_lint_looks_at_the_format_of_each_layer(pico_recipe: RecipeMaker, out: Path) -> None:
    plan = make_plan(pico_recipe(MIXED, *ALONE), out)
    build(plan, out, BuildOptions())
    tensors = read_header(out / "mixed/model.safetensors")
    config = json.loads((out / "mixed/config.json").read_text())
    assert list(quantisation_problems("mixed", config, {}, tensors)) == []
    groups = config["quantization_config"]["config_groups"].values()
    wrong = next(group for group in groups if group["format"] == "float-quantized")
    wrong["format"] = "pack-quantized"
    (problem,) = quantisation_problems("mixed", config, {}, tensors)
    assert "model.layers.1.self_attn.o_proj.weight_scale has no weight_packed of I32 beside it" in problem.message


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"*.nowhere": "w8a16"}, "overrides: '*.nowhere' matches no quantised module"),
        ({"*.v_proj": "nf4"}, "nf4 does not mix with other formats in one folder"),
        ({"*.v_proj": {"format": "w4a16", "options": {"group_size": 7}}}, "group_size 7"),
    ],
)
def test_what_cannot_be_mixed_is_told_before(
    pico_recipe: RecipeMaker, tmp_path: Path, overrides: Any, says: str
) -> None:
    with pytest.raises(PlanRefused, match="artifact mixed") as refused:
        make_plan(pico_recipe({**MIXED, "overrides": overrides}), tmp_path / "out")
    assert says in str(refused.value)


def test_exports_and_unknown_formats_have_no_overrides(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    with pytest.raises(PlanRefused, match="is exported whole"):
        make_plan(pico_recipe("bf16", {"format": "onnx-int4", "overrides": {"*": "w8a16"}}), tmp_path / "out")
    data = {"base": "b", "artifacts": [{"format": "w4a16", "overrides": {"*": "w8a61"}}]}
    with pytest.raises(UsageError, match="unknown format 'w8a61'"):
        make_recipe(data, tmp_path, "test")
    wrong = {"base": "b", "artifacts": [{"format": "w4a16", "overrides": {"*": {"format": "fp8", "option": {}}}}]}
    with pytest.raises(UsageError, match="unknown key"):
        make_recipe(wrong, tmp_path, "test")


def test_one_format_is_no_mixture() -> None:
    form = load_format("w8a16", TrainingQuantization())
    assert mix(form, {}, {}) is form
