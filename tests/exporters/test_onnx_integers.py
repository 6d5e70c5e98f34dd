"""ONNX with the integers of another artifact: the same weights to the last bit, and the same model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from onnx import numpy_helper

from qlora_export.artifact import Artifact
from qlora_export.engine import BuildOptions, build, export
from qlora_export.engine.journal import JOURNAL_NAME
from qlora_export.errors import EnvironmentProblem, ExportError, Refused
from qlora_export.exporters.onnx.skeleton import MixedRows, Run, require_all_placed, runs_of
from qlora_export.formats.registry import load_format
from qlora_export.planning.make import make_plan
from qlora_export.recipe.load import make_recipe
from qlora_export.runtimes.registry import load_runtime
from qlora_export.sources.checkpoint import read_tensors
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import Float32, TensorSpec, TrainingQuantization
from tests.exporters.test_onnx import TOKENS
from tests.helpers.pico import save_base

Made = tuple[Artifact, Artifact]
Weights = dict[str, Float32]


@pytest.fixture
def plain_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_export.exporters.onnx.builder.BUILDER", "tests.exporters.plain_builder")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def make(base: Path, out: Path, packed: dict[str, Any], exported: dict[str, Any]) -> Made:
    """The packed artifact and the export of its integers."""
    recipe = make_recipe({"base": str(base), "artifacts": [packed, exported]}, Path(), "test")
    plan = make_plan(recipe, out)
    (source,) = build(plan, out, BuildOptions())
    return source, export(plan, plan.exports[0], source, out)


def decoded(artifact: Artifact, packed: dict[str, Any], suffix: str = "") -> Weights:
    """The packed weights of an artifact whose names end so, as their format decodes them in float32."""
    form = load_format(packed["format"], TrainingQuantization(), packed.get("options", {}))
    tensors = read_tensors(artifact.path, ["model.safetensors"])
    found = {}
    with SourceFiles() as files:
        raw = {name: files.read_bytes(tensor, 0, tensor.bytes) for name, tensor in tensors.items()}
        for name in [name.removesuffix("_packed") for name in tensors if name.endswith(f"{suffix}weight_packed")]:
            rows, columns = (int(length) for length in raw[f"{name}_shape"].view(np.int64))
            values = form.decode(TensorSpec(name, "BF16", (rows, columns)), raw, range(rows))
            found[name] = values.reshape(rows, columns)
    return found


def in_graph(folder: Path) -> Weights:
    """Every MatMulNBits of a graph as the operator's documentation decodes it, [out, in], by its node."""
    model = onnx.load(folder / "model.onnx")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        facts = {attribute.name: attribute.i for attribute in node.attribute}
        rows, blocks = facts["N"], facts["K"] // facts["block_size"]
        codes = nibbles(tensors[node.input[1]].reshape(rows, -1), facts["bits"])
        zeros: Any = 1 << (facts["bits"] - 1)
        if len(node.input) > 3:
            zeros = nibbles(tensors[node.input[3]].reshape(rows, -1), facts["bits"])[:, :blocks]
            zeros = np.repeat(zeros, facts["block_size"], 1)
        scales = np.repeat(tensors[node.input[2]].reshape(rows, blocks), facts["block_size"], 1)
        found[node.name] = (codes - zeros).astype(np.float32) * scales
    return found


def nibbles(packed: Any, bits: int) -> Any:
    """Codes of a row of bytes, the lower half first."""
    if bits == 8:
        return packed.astype(np.int32)
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1).astype(np.int32)


def same_bits(first: Float32, second: Float32) -> bool:
    return first.shape == second.shape and bool((first.view(np.uint32) == second.view(np.uint32)).all())


ODD: dict[str, Any] = {
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 44,
    "hidden_size": 384,
    "intermediate_size": 640,
    "num_hidden_layers": 1,
}
W4A16: list[dict[str, Any]] = [
    {"group_size": 32},
    {"group_size": 64, "symmetric": False},
    {"group_size": 128},
    {"group_size": 128, "symmetric": False},
]


@pytest.mark.parametrize(("options", "tied"), list(zip(W4A16, (False, True, True, False), strict=True)))
def test_the_graph_holds_the_packed_weights_to_the_last_bit(
    plain_builder: None, tmp_path: Path, options: dict[str, Any], tied: bool
) -> None:
    """Three heads of queries on one of keys, rows that end inside a word of zero points."""
    base = save_base(tmp_path / "base", seed=3, tie_word_embeddings=tied, **ODD)
    packed = {"format": "w4a16", "rounding": "nearest", "options": options, "keep": ["*.o_proj"]}
    source, made = make(base, tmp_path / "out", packed, {"format": "onnx-int4", "rounding": "nearest"})
    expected, found = decoded(source, packed), in_graph(made.path)
    assert len(expected) == 6
    attention = "model.layers.0.self_attn"
    stacked = np.concatenate([expected.pop(f"{attention}.{part}_proj.weight") for part in "qkv"])
    assert same_bits(found.pop(f"{attention}.qkv_proj_Q4"), stacked)
    for name, weight in expected.items():
        assert same_bits(found.pop(f"{name.removesuffix('.weight')}_Q4"), weight), name
    assert not found
    assert made.manifest["exporter"]["integers"] == "w4a16"


def test_rows_of_a_whole_scale_and_layers_unlike_their_neighbours(plain_builder: None, tmp_path: Path) -> None:
    """8 bits with a scale a row, whose blocks share it; v in 8 bits beside q and k in 4 shares no product with them."""
    base = save_base(tmp_path / "base", seed=4, **ODD)
    packed: dict[str, Any] = {"format": "w8a16", "rounding": "search", "keep": ["*.o_proj"]}
    source, made = make(base, tmp_path / "eight", packed, {"format": "onnx-int8", "rounding": "search"})
    expected, found = decoded(source, packed), in_graph(made.path)
    assert same_bits(found["model.layers.0.mlp.up_proj_Q8"], expected["model.layers.0.mlp.up_proj.weight"])
    mixed = {"overrides": {"*.v_proj": "w8a16"}, "keep": ["*.o_proj", "*.k_proj"], "rounding": "nearest"}
    packed = {"format": "w4a16", "options": {"group_size": 64}, **mixed}
    source, made = make(base, tmp_path / "mixed", packed, {"format": "onnx-int4", "rounding": "nearest"})
    (eight,) = decoded(source, {"format": "w8a16"}, "v_proj.").values()
    found = in_graph(made.path)
    assert same_bits(found["model.layers.0.self_attn.v_proj_Q8"], eight)
    assert "model.layers.0.self_attn.q_proj_Q4" in found
    assert not any("qkv" in name or "k_proj" in name for name in found)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """By the builder itself, with biases, a tied head of its own 8 bits, and zero points."""
    shapes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
    }
    base = save_base(tmp_path_factory.mktemp("base") / "base", seed=5, **shapes, attention_bias=True)
    options = {"accuracy_level": 1, "last_matrix": "int8"}
    packed = {"format": "w4a16", "rounding": "search", "options": {"group_size": 64, "symmetric": False}}
    exported = {"format": "onnx-int4", "rounding": "search", "options": options}
    return make(base, tmp_path_factory.mktemp("out"), packed, exported)


def test_both_compute_the_same(exported: Made) -> None:
    """Prefill and decoding with the cache against transformers on the decoded weights, the head as the graph has it."""
    source, made = exported
    packed = {"format": "w4a16", "options": {"group_size": 64, "symmetric": False}}
    weights: dict[str, Any] = dict(decoded(source, packed))
    tensors = read_tensors(source.path, ["model.safetensors"])
    with SourceFiles() as files:
        weights |= {n: files.values(tensor) for n, tensor in tensors.items() if "_proj.weight" not in n}
    weights["lm_head.weight"] = in_graph(made.path)["/lm_head/MatMul_Q8"]
    config = transformers.AutoConfig.from_pretrained(source.path)
    del config.quantization_config
    config.tie_word_embeddings = False
    model = transformers.LlamaForCausalLM(config).float().eval()
    model.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TOKENS])).logits[0]
    with load_runtime("onnxruntime").open(made.path) as session:
        found = session.log_probabilities(TOKENS)
    assert np.abs(found - torch.log_softmax(logits, -1).numpy()).max() < 1e-4
    rounded, head = weights["lm_head.weight"], weights["model.embed_tokens.weight"]
    assert 0 < np.abs(rounded - head).max() <= np.abs(head).max() / 127.5


def test_nothing_else_is_left_and_every_tensor_can_be_mapped(exported: Made) -> None:
    _, made = exported
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "manifest.json"} <= set(made.manifest["files"]) | {
        path.name for path in made.path.iterdir()
    }
    assert not any(path.name.startswith(".") for path in made.path.iterdir())
    model = onnx.load(made.path / "model.onnx", load_external_data=False)
    places = []
    for tensor in model.graph.initializer:
        facts = {entry.key: entry.value for entry in tensor.external_data}
        places.append((int(facts["offset"]), int(facts["length"])))
        assert int(facts["offset"]) % 4096 == 0
    ends = [offset + length for offset, length in sorted(places)]
    assert all(end <= start for end, (start, _) in zip(ends, sorted(places)[1:], strict=False))
    assert json.loads((made.path / "genai_config.json").read_text())["model"]["vocab_size"] == 2048
    onnxruntime.InferenceSession(str(made.path / "model.onnx"))


@pytest.mark.parametrize(
    ("packed", "options", "says"),
    [
        ({"rounding": "search"}, {}, "holds the codes of another artifact, w4a16: there is none"),
        ({"rounding": "nearest", "onto": "as-trained"}, {}, "there is none"),
        ({"rounding": "nearest", "options": {"group_size": 32}}, {"block_size": 128}, "there is none"),
        ({"rounding": "nearest", "options": {"group_size": 32}}, {"symmetric": False}, "there is none"),
        ({"rounding": "nearest"}, {"block_size": 33}, "block_size is 33"),
        ({"rounding": "nearest", "options": {"group_size": 128}}, {}, "128"),
    ],
)
def test_a_plan_without_the_integers(
    pico_base: Path, pico_adapter: Path, tmp_path: Path, packed: Any, options: Any, says: str
) -> None:
    """The last one: 88 columns, which no group divides."""
    artifacts = [{"format": "w4a16", "keep": ["*.down_proj"], **packed}]
    if "options" not in packed:
        artifacts[0]["options"] = {"group_size": 32}
    elif packed["options"]["group_size"] == 128:
        artifacts[0].pop("keep")
    exported = {"format": "onnx-int4", "rounding": "nearest", "onto": "original", "options": options}
    data = {"base": str(pico_base), "adapter": str(pico_adapter), "artifacts": [*artifacts, exported]}
    with pytest.raises(ExportError, match=says) as error:
        make_plan(make_recipe(data, Path(), "test"), tmp_path)
    assert error.value.exit_code == 2
    assert error.value.hint


def test_the_plan_counts_the_disk_that_the_builder_needs_meanwhile(
    pico_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = {"format": "w4a16", "rounding": "nearest", "options": {"group_size": 32}, "keep": ["*.down_proj"]}
    artifacts = [packed, {"format": "onnx-int4", "rounding": "nearest"}]
    recipe = make_recipe({"base": str(pico_base), "artifacts": artifacts}, Path(), "test")
    plan = make_plan(recipe, tmp_path)
    (item,) = plan.exports
    assert item.working_bytes > 4 * plan.checkpoint.weights["lm_head.weight"].spec.size
    for free, fits in ((plan.bytes + item.working_bytes, True), (plan.bytes + item.working_bytes - 1, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda place, free=free: SimpleNamespace(free=free))
        if fits:
            make_plan(recipe, tmp_path)
            continue
        with pytest.raises(ExportError, match=f"{item.working_bytes} of them while they are made") as error:
            make_plan(recipe, tmp_path)
        assert error.value.exit_code == 6


@pytest.mark.parametrize(
    ("builder", "error", "says"),
    [
        ("tests.exporters.killed_builder", EnvironmentProblem, "onnx-int4: the model builder was killed by SIGKILL"),
        ("tests.exporters.no_such_builder", EnvironmentProblem, "onnx-int4: the model builder failed: .*No module"),
    ],
)
def test_a_builder_that_dies_leaves_nothing_final(
    plain_builder: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builder: str, error: Any, says: str
) -> None:
    base = save_base(tmp_path / "base", seed=3, **ODD)
    monkeypatch.setattr("qlora_export.exporters.onnx.builder.BUILDER", builder)
    packed = {"format": "w4a16", "rounding": "nearest", "keep": ["*.o_proj"]}
    with pytest.raises(error, match=says) as raised:
        make(base, tmp_path / "out", packed, {"format": "onnx-int4", "rounding": "nearest"})
    assert raised.value.exit_code == 6
    assert raised.value.hint
    assert not (tmp_path / "out/onnx-int4-nearest").exists()
    assert {path.name for path in (tmp_path / "out/onnx-int4-nearest.partial").iterdir()} == {JOURNAL_NAME}


def test_marks_are_read_as_they_are_meant() -> None:
    marked = [TensorSpec("a", "BF16", (300, 64)), TensorSpec("b", "BF16", (2, 64))]

    def mark(weight: int, row: int) -> list[int]:
        return [101, 0, 0, weight, 0, 0, row // 128, row % 128]

    rows = [mark(1, 0), mark(1, 1), *(mark(0, row) for row in range(300))]
    marks = np.array(rows, np.float32).T
    runs = runs_of(marks, marked, "w")
    assert runs == (Run("b", 0, 2), Run("a", 0, 300))
    require_all_placed(runs, marked, "onnx-int4")
    with pytest.raises(Refused, match="row 0 of b is 0 times"):
        require_all_placed(runs[1:], marked, "onnx-int4")
    with pytest.raises(Refused, match="row 0 of b is 2 times"):
        require_all_placed([*runs, Run("b", 0, 1)], marked, "onnx-int4")
    assert runs_of(np.zeros((8, 4), np.float32), marked, "w") is None
    with pytest.raises(MixedRows):
        runs_of(np.concatenate([marks, np.zeros((8, 1), np.float32)], axis=1), marked, "w")
