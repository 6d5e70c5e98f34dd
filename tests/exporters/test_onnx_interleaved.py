"""ONNX with the integers of `gptq` and `awq`: the weights that their own runtime decodes, to the last bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlora_export.errors import ExportError, Refused
from qlora_export.planning.make import make_plan
from qlora_export.recipe.load import make_recipe
from qlora_export.runtimes.gptq_awq import decoded
from qlora_export.runtimes.registry import load_runtime
from tests.exporters.test_onnx import TOKENS
from tests.exporters.test_onnx_integers import ODD, Made, in_graph, make, plain_builder, same_bits
from tests.helpers.files import edit_tensors
from tests.helpers.pico import save_base

__all__ = ["plain_builder"]
# Rows in words of eight, columns in groups of 32 and of 128.
NARROW: dict[str, Any] = {**ODD, "head_dim": 40, "hidden_size": 96, "intermediate_size": 160}
WIDE: dict[str, Any] = {**ODD, "head_dim": 40}


def weights(folder: Path, method: str) -> dict[str, Any]:
    """Every tensor of a folder, its packed weights as its runtime decodes them, before they are rounded."""
    return decoded(load_file(folder / "model.safetensors"), method, torch.float32)


def exported_from(source: str, **changes: Any) -> dict[str, Any]:
    return {"format": "onnx-int4", "rounding": "nearest", "options": {"integers": source}, **changes}


@pytest.mark.parametrize("source", ["gptq", "awq"])
@pytest.mark.parametrize(("group", "shapes"), [(32, NARROW), (64, WIDE), (128, WIDE)])
def test_the_graph_holds_what_the_runtime_decodes(
    plain_builder: None, tmp_path: Path, source: str, group: int, shapes: dict[str, Any]
) -> None:
    base = save_base(tmp_path / "base", seed=3, tie_word_embeddings=group == 64, **shapes)
    packed = {"format": source, "rounding": "nearest", "options": {"group_size": group}, "keep": ["*.o_proj"]}
    made_from, made = make(base, tmp_path / "out", packed, exported_from(source))
    expected, found = weights(made_from.path, source), in_graph(made.path)
    layer = "model.layers.0"
    stacked = np.concatenate([expected[f"{layer}.self_attn.{part}_proj.weight"].numpy() for part in "qkv"])
    assert same_bits(found.pop(f"{layer}.self_attn.qkv_proj_Q4"), stacked)
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = expected[f"{layer}.mlp.{name}.weight"].numpy()
        assert same_bits(found.pop(f"{layer}.mlp.{name}_Q4"), weight), name
    assert not found
    assert made.manifest["exporter"]["integers"] == source


def test_words_are_taken_apart_where_a_product_begins_inside_of_one(
    plain_builder: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few rows at a time, none a multiple of the eight outputs of a word."""
    monkeypatch.setattr("qlora_export.exporters.onnx.integers.CHUNK_VALUES", 96 * 11)
    base = save_base(tmp_path / "base", seed=6, **NARROW)
    packed = {"format": "awq", "rounding": "nearest", "options": {"group_size": 32}, "keep": ["*.o_proj"]}
    made_from, made = make(base, tmp_path / "out", packed, exported_from("awq"))
    expected, found = weights(made_from.path, "awq"), in_graph(made.path)
    assert same_bits(found["model.layers.0.mlp.up_proj_Q4"], expected["model.layers.0.mlp.up_proj.weight"].numpy())


@pytest.fixture(scope="module", params=["gptq", "awq"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Made]:
    """By the builder itself, calibrated, with biases and a tied head."""
    shapes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
    folder = tmp_path_factory.mktemp(request.param)
    base = save_base(folder / "base", seed=5, **shapes, attention_bias=True)
    packed = {"format": request.param, "rounding": "search", "options": {"group_size": 32}}
    exported = exported_from(request.param, rounding="search")
    exported["options"]["accuracy_level"] = 1
    return request.param, make(base, folder / "out", packed, exported)


def test_both_compute_the_same(served: tuple[str, Made]) -> None:
    """Prefill and decoding with the cache against transformers on the decoded weights in float32."""
    method, (source, made) = served
    config = transformers.AutoConfig.from_pretrained(source.path)
    del config.quantization_config
    model = transformers.LlamaForCausalLM(config).float().eval()
    missing = model.load_state_dict(weights(source.path, method), strict=False).missing_keys
    assert missing == ["lm_head.weight"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TOKENS])).logits[0]
    with load_runtime("onnxruntime").open(made.path) as session:
        found = session.log_probabilities(TOKENS)
    assert np.abs(found - torch.log_softmax(logits, -1).numpy()).max() < 1e-4


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("g_idx", torch.arange(64, dtype=torch.int32).flip(0) // 32, r"q_proj: its groups are not .*act-order"),
        ("qzeros", torch.full((2, 8), 0x77777776, dtype=torch.int32), "q_proj: it has zero points other than 8"),
    ],
)
def test_act_order_and_other_zero_points_are_refused_by_name(
    plain_builder: None, tmp_path: Path, part: str, value: torch.Tensor, says: str
) -> None:
    """Our own folders have neither."""
    base = save_base(tmp_path / "base", seed=5)
    packed = {"format": "gptq", "rounding": "nearest", "options": {"group_size": 32}, "keep": ["*.down_proj"]}
    recipe = make_recipe({"base": str(base), "artifacts": [packed, exported_from("gptq")]}, Path(), "test")
    exporter = make_plan(recipe, tmp_path / "out").exports[0].exporter
    source, _ = make(base, tmp_path / "out", packed, exported_from("gptq"))
    name = f"model.layers.1.self_attn.q_proj.{part}"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        assert tensors[name].shape == value.shape
        tensors[name] = value

    edit_tensors(source.path / "model.safetensors", change)
    with pytest.raises(Refused, match=f"model.layers.1.self_attn.{says}") as error:
        exporter.export(source.path, tmp_path / "out")
    assert error.value.hint


@pytest.mark.parametrize(
    ("artifacts", "says", "hint"),
    [
        ([{"format": "w4a16"}, exported_from("gptq")], "the codes of another artifact, gptq", "format: gptq, rounding"),
        ([{"format": "gptq"}, exported_from("gptq", rounding="search")], "gptq: there is none", "rounding: search"),
        ([{"format": "awq"}, exported_from("gptq")], "gptq: there is none", r"`options: \{integers: awq\}`"),
        ([{"format": "gptq"}, exported_from("w4a16")], "w4a16: there is none", r"`options: \{integers: gptq\}`"),
        (
            [{"format": "awq"}, exported_from("awq", options={"integers": "awq", "symmetric": True})],
            "there is none",
            "awq",
        ),
        ([{"format": "gptq"}, exported_from("nf4")], "integers is 'nf4'", "w4a16, gptq, awq"),
        ([{"format": "onnx-int4", "options": {"integers": "gptq"}}], "no option 'integers'", "its options"),
        (
            [{"format": "w8a16"}, {"format": "onnx-int8", "rounding": "nearest", "options": {"integers": "w8a16"}}],
            "onnx-int8 has no option 'integers'",
            "its options",
        ),
    ],
)
def test_a_plan_without_the_integers(
    pico_base: Path, tmp_path: Path, artifacts: list[dict[str, Any]], says: str, hint: str
) -> None:
    grouped = {"rounding": "nearest", "options": {"group_size": 32}, "keep": ["*.down_proj"]}
    made = [{**grouped, **item} if item["format"] in ("w4a16", "gptq", "awq") else item for item in artifacts]
    recipe = make_recipe({"base": str(pico_base), "artifacts": ["bf16", *made]}, Path(), "test")
    with pytest.raises(ExportError, match=says) as error:
        make_plan(recipe, tmp_path)
    assert error.value.exit_code == 2
    assert re.search(hint, error.value.hint)


def test_integers_that_could_be_of_two_are_told(pico_base: Path, tmp_path: Path) -> None:
    kept = {"rounding": "nearest", "keep": ["*.down_proj"]}
    artifacts = [
        {"format": "w4a16", "name": "fine", "options": {"group_size": 32}, **kept},
        {"format": "w4a16", "name": "coarse", "options": {"group_size": 64}, **kept},
    ]

    def plan(**options: Any) -> Any:
        exported = exported_from("w4a16", options=options)
        recipe = make_recipe({"base": str(pico_base), "artifacts": [*artifacts, exported]}, Path(), "test")
        return make_plan(recipe, tmp_path)

    with pytest.raises(ExportError, match="the integers of fine, coarse could be meant") as error:
        plan()
    assert error.value.exit_code == 2
    assert "block_size" in error.value.hint
    assert plan(block_size=64).exports[0].source_name == "coarse"
