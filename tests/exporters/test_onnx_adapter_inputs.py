"""One ONNX base for several adapters: inputs with defaults, `.onnx_adapter` files, ONNX Runtime and GenAI for real."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai
import pytest

from qlora_export import write_onnx_adapter
from qlora_export.artifact import Artifact
from qlora_export.drift.onnx.validation import validate
from qlora_export.engine import BuildOptions, build, export
from qlora_export.errors import Refused, UsageError
from qlora_export.exporters.onnx.adapted import adapted_base, factors
from qlora_export.exporters.onnx.beside import as_inputs
from qlora_export.exporters.onnx.graph import Product
from qlora_export.exporters.onnx.skeleton import Run
from qlora_export.planning.make import make_plan
from qlora_export.publish.hub.commit import WEIGHTS
from qlora_export.recipe.load import make_recipe
from qlora_export.runtimes.onnx.cached_graph import CachedGraph, log_softmax
from qlora_export.runtimes.onnx.running_graph import WithAdapter
from qlora_export.sources.adapter import open_adapter
from qlora_export.sources.checkpoint import open_checkpoint
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import Float32
from tests.drift.onnx.test_validation import TOKENS as WINDOWS
from tests.exporters.test_onnx import TOKENS
from tests.exporters.test_onnx_nf4 import PATTERNS
from tests.exporters.test_transformers_js import COUNT as NODE_COUNT
from tests.exporters.test_transformers_js import in_node
from tests.helpers.pico import save_adapter, save_base

INPUTS: list[Any] = [
    {"format": "onnx-nf4-adapter", "name": "inputs", "options": {"adapter": "inputs"}},
    {"format": "onnx-nf4-adapter", "name": "laid-out", "options": {"adapter": "inputs", "layout": "transformers.js"}},
]
COUNT = 40


@dataclass(frozen=True)
class Exported:
    """The artifacts of two adapters of one base, and the folders of both."""

    first: dict[str, Artifact]
    second: dict[str, Artifact]
    adapters: tuple[Path, Path]

    @property
    def source(self) -> Path:
        return self.first["nf4-adapter"].path

    @property
    def graph(self) -> Path:
        return self.first["inputs"].path


def made(base: Path, adapter: Path, out: Path, exports: list[Any]) -> dict[str, Artifact]:
    artifacts = ["nf4-adapter", "onnx-nf4-adapter", *exports]
    data = {"base": str(base), "adapter": str(adapter), "artifacts": artifacts}
    plan = make_plan(make_recipe(data, Path(), "test"), out)
    (source,) = build(plan, out, BuildOptions())
    return {"nf4-adapter": source, **{item.name: export(plan, item, source, out) for item in plan.exports}}


@pytest.fixture(scope="module")
def exported(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """One adapter with ranks by pattern, one of another rank that leaves layers as they are; one graph for all."""
    out = tmp_path_factory.mktemp("several")
    first = save_adapter(pico_base, out / "first", seed=6, **PATTERNS)
    second = save_adapter(pico_base, out / "second", seed=9, r=7, target_modules=["q_proj", "up_proj", "down_proj"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_export.exporters.onnx.builder.BUILDER", "tests.exporters.kept_builder")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.setenv("KEPT_GRAPHS", str(out / "kept"))
        return Exported(
            made(pico_base, first, out / "run-first", INPUTS),
            made(pico_base, second, out / "run-second", []),
            (first, second),
        )


@pytest.fixture(scope="module")
def second_file(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "second.onnx_adapter"
    write_onnx_adapter(exported.adapters[1], exported.source, path)
    return path


def opened(graph: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def rows(
    folder: Path, adapter: Path | None = None, graph: str = "model.onnx", tokens: Sequence[int] = TOKENS
) -> Float32:
    """Log-probabilities of prefill and of four decoded tokens."""
    session = opened(folder / graph)
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    running = CachedGraph(session if adapter is None else WithAdapter(session, adapter), decoder)
    return log_softmax(running.rows([tokens], 4)[0])


def apart(first: Float32, second: Float32) -> float:
    """The largest difference, of the largest value: products by a constant are packed, and add up in another order."""
    return float(np.abs(first - second).max() / np.abs(second).max())


def greedy(folder: Path, adapters: Sequence[Path] = ()) -> list[list[int]]:
    """What GenAI writes with each adapter that one open model was given, or with none."""
    model = onnxruntime_genai.Model(str(folder))
    loaded = onnxruntime_genai.Adapters(model)
    found = []
    for adapter in adapters or (None,):
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=COUNT, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        if adapter is not None:
            loaded.load(str(adapter), adapter.stem)
            generator.set_active_adapter(loaded, adapter.stem)
        generator.append_tokens(TOKENS)
        while not generator.is_done():
            generator.generate_next_token()
        found.append([int(token) for token in generator.get_sequence(0)])
    return found


def parameters_of(path: Path) -> dict[str, Float32]:
    return {
        name: value.numpy().copy()
        for name, value in onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters().items()
    }


def save(parameters: dict[str, Float32], path: Path) -> Path:
    made = onnxruntime.AdapterFormat()
    made.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(parameters[name]) for name in parameters})
    made.export_adapter(str(path))
    return path


def test_by_itself_it_is_the_constant_one(exported: Exported) -> None:
    expected = rows(exported.first["onnx-nf4-adapter"].path)
    assert apart(rows(exported.graph), expected) < 1e-6
    assert apart(rows(exported.graph, exported.graph / "adapter.onnx_adapter"), expected) < 1e-6


def test_its_inputs_are_named_by_module_and_have_a_rank_of_their_own(exported: Exported) -> None:
    session = opened(exported.graph / "model.onnx")
    inputs = {item.name: (item.shape, item.type) for item in session.get_overridable_initializers()}
    assert len(inputs) == 28
    module = "model.layers.1.mlp.down_proj"
    assert inputs[f"{module}.lora_A"] == ([88, f"{module}.rank"], "tensor(float)")
    assert inputs[f"{module}.lora_B"] == ([f"{module}.rank", 64], "tensor(float)")
    assert not {item.name for item in session.get_inputs()} & inputs.keys()
    found = parameters_of(exported.graph / "adapter.onnx_adapter")
    assert found.keys() == inputs.keys()
    assert found["model.layers.0.self_attn.q_proj.lora_A"].shape == (64, 8)


def test_products_of_some_rows_share_the_inputs_of_their_module(exported: Exported) -> None:
    """As where q, k and v are one weight of the checkpoint, and several products of the graph."""
    base = adapted_base(open_checkpoint(exported.source), open_adapter(exported.source / "adapter"))
    layer = base.layers["model.layers.0.mlp.up_proj.weight"]
    assert layer.change is not None
    made = []
    with SourceFiles() as files:
        for number, run in enumerate((Run("up", 0, 40), Run("up", 40, 48))):
            product = Product(f"/{number}", f"part.{number}", 64, run.rows, "x", f"y.{number}")
            made.append(as_inputs(files, product, run, layer, f"base.{number}"))
        a, b = factors(layer.change, files)
    assert [value.name for value in made[0].inputs] == [value.name for value in made[1].inputs]
    x, bases = np.ones((1, 3, 64), np.float32), [np.full((1, 3, count), 2, np.float32) for count in (40, 48)]
    values = [("x", x), ("base.0", bases[0]), ("base.1", bases[1])]
    free = [onnx.helper.make_tensor_value_info(name, 1, item.shape) for name, item in values]
    outputs = [onnx.helper.make_tensor_value_info(f"y.{number}", 1, None) for number in (0, 1)]
    nodes = [node for item in made for node in item.nodes]
    graph = onnx.helper.make_graph(nodes, "parts", [*free, *made[0].inputs], outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    given = {**dict(values), **dict(zip([value.name for value in made[0].inputs], (a, b), strict=True))}
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, given)
    expected = 2 + x @ (a.astype(np.float64) @ b)
    assert np.abs(np.concatenate(found, axis=2) - expected).max() < 1e-5


def test_another_adapter_gives_the_logits_of_its_own_export(exported: Exported, second_file: Path) -> None:
    expected = rows(exported.second["onnx-nf4-adapter"].path)
    assert apart(rows(exported.graph), expected) > 0.01
    assert apart(rows(exported.graph, second_file), expected) < 1e-6


def test_with_zeros_it_is_the_base_alone(exported: Exported, tmp_path: Path) -> None:
    zeros = {
        name: np.zeros_like(values) for name, values in parameters_of(exported.graph / "adapter.onnx_adapter").items()
    }
    folder = Path(shutil.copytree(exported.first["onnx-nf4-adapter"].path, tmp_path / "base"))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.name.endswith("/lora_Add"):
            node.op_type = "Identity"
            del node.input[1]
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    assert apart(rows(exported.graph, save(zeros, tmp_path / "none.onnx_adapter")), rows(folder)) < 1e-6


def test_genai_writes_what_each_adapters_own_export_writes(exported: Exported, second_file: Path) -> None:
    first, second = (greedy(item["onnx-nf4-adapter"].path)[0] for item in (exported.first, exported.second))
    assert first != second
    assert greedy(exported.graph) == [first]
    own = exported.graph / "adapter.onnx_adapter"
    assert greedy(exported.graph, [second_file, own]) == [second, first]


@pytest.mark.parametrize("name", ["inputs", "laid-out"])
def test_it_is_valid_in_every_way(exported: Exported, name: str) -> None:
    found = validate(exported.first[name].path, WINDOWS, None)
    assert found.breaches == ()
    way = next(way for way in found.ways if way.name == "prefill with the adapter's file")
    assert way.from_prefill is not None
    assert (way.from_prefill.tokens, way.from_prefill.limit) == (160, 1e-4)


def test_a_file_of_another_adapter_beside_the_graph_is_found(
    exported: Exported, second_file: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported.graph, tmp_path / "copied"))
    shutil.copyfile(second_file, folder / "adapter.onnx_adapter")
    (breach,) = validate(folder, WINDOWS, None).breaches
    assert breach.startswith("ONNX: prefill with the adapter's file differs from prefill: mean KL ")
    assert "the first layer that departs is model.layers.0.attn.q_proj" in breach


def test_a_file_that_lies_elsewhere_is_not_opened(exported: Exported, second_file: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported.graph, tmp_path / "copied"))
    (folder / "adapter.onnx_adapter").unlink()
    (folder / "adapter.onnx_adapter").symlink_to(second_file)
    with pytest.raises(Refused, match="leads out of the folder"):
        validate(folder, WINDOWS, None)


def test_the_layout_of_transformers_js(exported: Exported) -> None:
    folder = exported.first["laid-out"].path
    graph = "onnx/model_bnb4.onnx"
    assert apart(rows(folder, graph=graph), rows(exported.graph)) < 1e-6
    assert {path.name for path in folder.glob("*.onnx*")} == {"adapter.onnx_adapter"}
    assert (folder / "adapter.onnx_adapter").read_bytes() == (exported.graph / "adapter.onnx_adapter").read_bytes()


def test_transformers_js_writes_what_the_default_adapter_says(exported: Exported, tmp_path: Path) -> None:
    (found,) = in_node(exported.first["laid-out"].path, ["Hi, my order 375 is late."], tmp_path)
    written = rows(exported.graph, tokens=found[:-1])[-NODE_COUNT:].argmax(axis=1)
    assert written.tolist() == found[-NODE_COUNT:]


def test_a_release_that_has_none_removes_the_file() -> None:
    assert WEIGHTS.fullmatch("adapter.onnx_adapter")


@pytest.mark.filterwarnings("ignore:.*LoRA", "ignore:Setting `save_embedding_layers")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "its adapter is no plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight: the adapter replaces or unties it"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.weight: the adapter replaces or unties it"),
    ],
)
def test_another_adapter_that_is_no_plain_one_is_refused(
    exported: Exported, pico_base: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    adapter = save_adapter(pico_base, tmp_path / "adapter", seed=7, **{"target_modules": ["q_proj"], **changes})
    with pytest.raises(Refused, match=says) as error:
        write_onnx_adapter(adapter, exported.source, tmp_path / "made.onnx_adapter")
    assert error.value.exit_code == 4
    assert error.value.hint
    assert list(tmp_path.iterdir()) == [adapter]


def test_layers_without_inputs_are_refused(exported: Exported, tmp_path: Path) -> None:
    """The graph of the second adapter has no inputs for what only the first one changes."""
    with pytest.raises(Refused, match=r"changes model.layers.0.mlp.gate_proj, which the graph has no inputs for"):
        write_onnx_adapter(exported.adapters[0], exported.second["nf4-adapter"].path, tmp_path / "made.onnx_adapter")


def test_an_adapter_of_another_base_is_refused(exported: Exported, tmp_path: Path) -> None:
    other = save_base(tmp_path / "base", seed=31)
    adapter = save_adapter(other, tmp_path / "adapter", seed=7, target_modules=["q_proj"])
    with pytest.raises(Refused, match=r"was trained on other 4-bit codes of model.layers.0.mlp.down_proj"):
        write_onnx_adapter(adapter, exported.source, tmp_path / "made.onnx_adapter")


def test_no_file_is_written_over(exported: Exported, second_file: Path) -> None:
    before = second_file.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        write_onnx_adapter(exported.adapters[0], exported.source, second_file)
    assert second_file.read_bytes() == before
