"""The NF4 base of training in ONNX: bitsandbytes' bytes, the adapter beside them, and what training computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qlora_export.artifact import Artifact
from qlora_export.engine import BuildOptions, build, export
from qlora_export.errors import ExportError, PlanRefused
from qlora_export.planning.make import make_plan
from qlora_export.planning.plan import Plan
from qlora_export.recipe.load import make_recipe
from qlora_export.runtimes.as_trained import open_as_trained
from qlora_export.runtimes.registry import load_runtime
from qlora_export.sources.checkpoint import open_checkpoint
from qlora_export.sources.weights import FourBitWeight
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import Float32
from tests.exporters.test_onnx import TOKENS
from tests.helpers.pico import RecipeMaker, save_adapter, save_base

EXPORTS: list[Any] = [
    "nf4-adapter",
    "onnx-nf4-adapter",
    {"format": "onnx-nf4-adapter", "name": "as-trained", "options": {"decode": "as-trained"}},
]
# A rank and an alpha by pattern, and the scale of rsLoRA.
PATTERNS: dict[str, Any] = {
    "use_rslora": True,
    "rank_pattern": {"q_proj": 8},
    "alpha_pattern": {"down_proj": 3, "layers.1.self_attn.v_proj": 5},
}


@pytest.fixture(scope="module")
def exported(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, dict[str, Artifact]]:
    """Both exports, whose graphs the builder makes once."""
    out = tmp_path_factory.mktemp("nf4")
    adapter = save_adapter(pico_base, out / "adapter", seed=6, **PATTERNS)
    data = {"base": str(pico_base), "adapter": str(adapter), "artifacts": EXPORTS}
    plan = make_plan(make_recipe(data, Path(), "test"), out / "run")
    (source,) = build(plan, out / "run", BuildOptions())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_export.exporters.onnx.builder.BUILDER", "tests.exporters.kept_builder")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.setenv("KEPT_GRAPHS", str(out / "kept"))
        made = {item.name: export(plan, item, source, out / "run") for item in plan.exports}
    return plan, {**made, "nf4-adapter": source}


def divergence(first: Float32, second: Float32) -> float:
    one, other = (np.float64(rows) - np.log(np.exp(np.float64(rows)).sum(axis=1))[:, None] for rows in (first, second))
    return float((np.exp(one) * (one - other)).sum(axis=1).mean())


def test_it_computes_what_training_computed(exported: tuple[Plan, dict[str, Artifact]]) -> None:
    """The 4-bit kernel but for the rounding that training did, the other to the rounding errors of float32."""
    plan, made = exported
    assert plan.adapter is not None
    reference = open_as_trained(plan.checkpoint, plan.adapter, plan.live_training).tuned().log_probabilities(TOKENS)
    found = {}
    for name in ("onnx-nf4-adapter", "as-trained"):
        with load_runtime("onnxruntime").open(made[name].path) as session:
            found[name] = session.log_probabilities(TOKENS)
    assert 1e-9 < divergence(reference, found["onnx-nf4-adapter"]) < 1e-4
    assert divergence(reference, found["as-trained"]) < 1e-10
    assert np.abs(reference - found["as-trained"]).max() < 1e-4


def test_the_bytes_are_those_of_bitsandbytes(exported: tuple[Plan, dict[str, Artifact]]) -> None:
    _, made = exported
    weights = open_checkpoint(made["nf4-adapter"].path).weights
    model = onnx.load(made["onnx-nf4-adapter"].path / "model.onnx")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "MatMulBnb4"]
    assert len(nodes) == sum(isinstance(weight, FourBitWeight) for weight in weights.values()) == 14
    for node in nodes:
        facts = {attribute.name: attribute.i for attribute in node.attribute}
        module = node.input[1].removesuffix(".MatMul.weight_NF4").replace(".attn.", ".self_attn.")
        weight = weights[f"{module}.weight"]
        assert isinstance(weight, FourBitWeight)
        assert facts == {"K": weight.spec.columns, "N": weight.spec.rows, "block_size": 64, "quant_type": 1}
        with SourceFiles() as files:
            codes = files.read_bytes(weight.codes, 0, weight.codes.bytes)
            assert tensors[node.input[1]].tobytes() == codes.tobytes()
            assert tensors[node.input[2]].tobytes() == weight.scales(files).scales.tobytes()


@pytest.mark.filterwarnings("ignore:.*LoRA", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "has DoRA's magnitude, which is no plain LoRA"),
        ({"lora_bias": True}, "trained bias, which is no plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, r"lm_head.weight was trained whole \(modules_to_save\)"),
        ({"target_modules": ["q_proj", "lm_head"]}, "the adapter changes lm_head.weight, which was not in 4 bits"),
    ],
)
def test_what_is_no_plain_adapter_is_refused_by_the_plan(
    pico_recipe: RecipeMaker, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    base = save_base(tmp_path / "base", seed=8, attention_bias=True)
    adapter = save_adapter(base, tmp_path / "adapter", seed=7, **{"target_modules": ["q_proj"], **changes})
    sources = {"base": str(base), "adapter": str(adapter)}
    recipe = pico_recipe("nf4-adapter", "onnx-nf4-adapter", **sources, merge={"zero_delta": "keep"})
    with pytest.raises(PlanRefused, match=says) as error:
        make_plan(recipe, tmp_path / "out")
    assert error.value.exit_code == 4
    assert "merged format" in (error.value.hint or "")


@pytest.mark.parametrize(
    ("artifacts", "says"),
    [
        (["bf16", "onnx-nf4-adapter"], "holds the codes of another artifact, nf4-adapter: there is none"),
        (["nf4-adapter", {"format": "onnx-nf4-adapter", "rounding": "nearest"}], "nothing to be nearest"),
        (["nf4-adapter", {"format": "onnx-nf4-adapter", "onto": "original"}], "ships the base of training as it was"),
        (["nf4-adapter", {"format": "onnx-nf4-adapter", "options": {"decode": "x"}}], "decode is 'x'"),
    ],
)
def test_a_recipe_that_is_wrong(pico_recipe: RecipeMaker, tmp_path: Path, artifacts: Any, says: str) -> None:
    with pytest.raises(ExportError, match=says) as error:
        make_plan(pico_recipe(*artifacts), tmp_path)
    assert error.value.exit_code == 2
    assert error.value.hint
