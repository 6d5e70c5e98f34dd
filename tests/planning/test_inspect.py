from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from qlora_export.engine import BuildOptions, build
from qlora_export.errors import InputError, UsageError
from qlora_export.planning.inspect import inspect
from qlora_export.planning.make import make_plan
from tests.helpers.files import edit_json
from tests.helpers.pico import RecipeMaker
from tests.helpers.zoo import save_architecture, save_variant


def test_an_adapter(pico_base: Path, pico_adapter: Path) -> None:
    found = inspect(pico_adapter, pico_base, weights=True)
    assert (found.kind, found.problems) == ("adapter", ())
    assert found.facts["variant"] == "LoRA"
    assert (found.facts["rank"], found.facts["alpha"]) == ("4", 8)
    assert "q_proj x 2" in found.facts["targets"]
    assert "recorded in qlora_export.json" in found.facts["training quantisation"]
    tensors, base = load_file(pico_adapter / "adapter_model.safetensors"), load_file(pico_base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
    weight = base[f"{name}.weight"].float()
    layer = found.layers[f"{name}.weight"]
    assert layer["shape"] == [88, 64]
    assert layer["delta_over_weight"] == pytest.approx(float((2 * b @ a).norm() / weight.norm()), rel=1e-4)


@pytest.mark.parametrize("variant", ["dora", "embedding_dora", "parameters", "all_linear"])
def test_the_size_of_every_change_is_measured(tmp_path: Path, variant: str) -> None:
    base = save_architecture("mixtral", tmp_path / "base", seed=3)
    adapter = save_variant(base, "mixtral", variant, tmp_path / "adapter", seed=4)
    found = inspect(adapter, base, weights=True)
    assert found.problems == ()
    assert found.layers
    assert all(0.01 < layer["delta_over_weight"] < 5 for layer in found.layers.values())
    if variant in ("parameters", "all_linear"):
        assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in found.layers


def test_what_would_be_refused_is_listed(pico_base: Path, adapter_copy: Path) -> None:
    edit_json(adapter_copy / "adapter_config.json", kasa_config={"beta": 1}, rank_pattern={"layers.1.mlp.up_proj": 3})
    (adapter_copy / "qlora_export.json").unlink()
    found = inspect(adapter_copy, pico_base)
    assert ["KaSA" in found.problems[0].message, "need [3, 64]" in found.problems[1].message] == [True, True]
    assert "there is no qlora_export.json" in found.facts["training quantisation"]
    assert found.layers == {}


def test_a_checkpoint_and_an_artifact(pico_base: Path, pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    found = inspect(pico_base)
    assert (found.kind, found.facts["architecture"], found.facts["vocabulary"]) == (
        "checkpoint",
        "LlamaForCausalLM",
        2048,
    )
    assert found.facts["stored as"].startswith("plain x ")
    build(make_plan(pico_recipe("nf4"), tmp_path), tmp_path, BuildOptions())
    found = inspect(tmp_path / "nf4")
    assert (found.kind, found.facts["format"], found.facts["merged onto"]) == ("artifact", "nf4", "as-trained")
    assert found.facts["training quantisation"] == "sidecar"


def test_what_cannot_be_inspected(pico_base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapter, no checkpoint and no artifact"):
        inspect(tmp_path)
    with pytest.raises(UsageError, match="is no adapter"):
        inspect(pico_base, weights=True)
