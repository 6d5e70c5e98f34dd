"""An architecture that the model builder lacks, through `torch.onnx.export`: all artifacts, run in every way."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime_genai
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qlora_export.artifact import read_artifact
from qlora_export.drift.onnx.artifacts import validated
from qlora_export.drift.onnx.validation import Source, validate
from qlora_export.drift.onnx.variants import GraphFindings, VariantDistances
from qlora_export.drift.tokens import Protocol, TokenSet, Window
from qlora_export.errors import InputError, PlanRefused
from qlora_export.exporters.onnx.built import BuiltExporter
from qlora_export.exporters.onnx.graphs import obstacle
from qlora_export.exporters.onnx.traced import tracer
from qlora_export.exporters.onnx.traced.genai_config import genai_config
from qlora_export.exporters.onnx.traced.tracer import trace
from qlora_export.exporters.registry import load_exporter
from qlora_export.pipeline.options import RunOptions, untracked
from qlora_export.pipeline.release import build
from qlora_export.planning.make import make_plan
from qlora_export.recipe.config import Recipe
from qlora_export.recipe.load import make_recipe
from qlora_export.runtimes.registry import load_runtime
from tests.exporters.test_onnx_integers import decoded, in_graph, same_bits
from tests.helpers.pico import save_adapter

# Windows of attention shorter than the text beside layers without positions, tied embeddings, scaled logits.
COHERE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
PACKED: dict[str, Any] = {"format": "w4a16", "rounding": "nearest", "options": {"group_size": 32}}
EXPORTS: list[Any] = [
    "bf16",
    "onnx-fp32",
    {"format": "onnx-int4", "name": "rounded"},
    PACKED,
    {"format": "onnx-int4", "rounding": "nearest", "name": "same-integers"},
    "nf4-adapter",
    "onnx-nf4-adapter",
]
GENERATOR = np.random.default_rng(5)
IDS = [tuple(GENERATOR.integers(5, 2000, 101).tolist()) for _ in range(3)]
TOKENS = TokenSet(
    tuple(Window(ids, tuple(range(1, 101)), "", block) for block, ids in enumerate(IDS)),
    Protocol("test", "as the test says", 101),
)


def recipe(base: Path, adapter: Path, *artifacts: Any) -> Recipe:
    return make_recipe({"base": str(base), "adapter": str(adapter), "artifacts": list(artifacts)}, Path(), "test")


def save_model(folder: Path, pico_base: Path, config: Any) -> Path:
    """A model of random weights in bf16 with the pico tokenizer."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.normal_(mean=1, std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    for path in pico_base.glob("*token*"):
        shutil.copy(path, folder)
    return folder


def cohere(pico_base: Path, **changes: Any) -> transformers.Cohere2Config:
    vocabulary = json.loads((pico_base / "config.json").read_text())["vocab_size"]
    return transformers.Cohere2Config(**{"vocab_size": vocabulary, **COHERE, **changes})


@pytest.fixture(scope="module")
def made(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of all exports; they share one trace, which is also the plan's, as two layers are of two kinds."""
    out = tmp_path_factory.mktemp("traced")
    base = save_model(out / "base", pico_base, cohere(pico_base))
    adapter = save_adapter(base, out / "adapter", seed=8)
    build(recipe(base, adapter, *EXPORTS), RunOptions(out / "run"))
    return out / "run"


def in_every_way(found: GraphFindings, most: float) -> VariantDistances:
    """Prefill, of a graph that agrees with it and with its source in every other way."""
    assert found.breaches == ()
    prefill, *others = found.ways
    assert prefill.from_source is not None
    assert prefill.from_source.mean_kl < most
    assert len(others) >= 5
    return prefill


@pytest.mark.parametrize("name", ["onnx-fp32", "rounded", "same-integers", "onnx-nf4-adapter"])
def test_it_is_the_model_in_every_way_that_it_is_run(made: Path, name: str) -> None:
    """Prefill, decoding, batches padded on the left, without optimisation, past the window of attention."""
    found = validated(read_artifact(made / name), TOKENS, untracked)
    assert found is not None
    prefill = in_every_way(found, {"onnx-fp32": 1e-10}.get(name, 0.05))
    assert prefill.from_source is not None
    assert prefill.from_source.top1_differs == 0 or name != "onnx-fp32"


def test_so_it_is_in_float16(pico_base: Path, tmp_path: Path) -> None:
    """Traced in that dtype: one layer with a window of attention, as transformers.js reads it."""
    config = cohere(pico_base, num_hidden_layers=1, layer_types=["sliding_attention"], num_key_value_heads=4)
    base = save_model(tmp_path / "base", pico_base, config)
    exporter = load_exporter("onnx-fp16", {"layout": "transformers.js"})
    assert isinstance(exporter, BuiltExporter)
    exporter.export(base, tmp_path / "out")
    exporter.finish(base, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out/onnx").iterdir()} == {"model_fp16.onnx", "model_fp16.onnx_data"}
    source = Source("base", partial(load_runtime("transformers").open, base))
    found = validate(tmp_path / "out", TOKENS, source)
    assert found.weights == "float16"
    in_every_way(found, 1e-5)


def test_a_tied_embedding_is_stored_once_and_nothing_tells_of_this_machine(made: Path) -> None:
    graph = made / "onnx-fp32" / "model.onnx"
    model = onnx.load(graph, load_external_data=False)
    assert len([tensor for tensor in model.graph.initializer if max(tensor.dims) > 2000]) == 1
    assert {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    } == {"model.onnx.data"}
    raw = graph.read_bytes()
    assert b"site-packages" not in raw
    assert b".py" not in raw


def test_the_integers_are_those_of_the_packed_artifact(made: Path) -> None:
    expected = decoded(read_artifact(made / "w4a16-nearest"), PACKED)
    found = {
        name.removesuffix("/MatMul_Q4").strip("/"): weight for name, weight in in_graph(made / "same-integers").items()
    }
    assert len(found) == len(expected) == 14
    for name, weight in expected.items():
        path = name.removesuffix(".weight").replace(".", "/").replace("layers/", "layers.")
        assert same_bits(found[path], weight), name


def test_genai_writes_what_torch_writes(made: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(made / "bf16", dtype=torch.float32)
    opened = onnxruntime_genai.Model(str(made / "onnx-fp32"))
    for prompt in (IDS[0][:9], IDS[1][:40]):
        parameters = onnxruntime_genai.GeneratorParams(opened)
        parameters.set_search_options(max_length=len(prompt) + 16, do_sample=False)
        generator = onnxruntime_genai.Generator(opened, parameters)
        generator.append_tokens(list(prompt))
        while not generator.is_done():
            generator.generate_next_token()
        tokens = torch.tensor([prompt])
        expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=16, do_sample=False)
        assert generator.get_sequence(0).tolist()[: expected.shape[1]] == expected[0].tolist()


def test_the_plan_traces_as_few_layers_as_there_are_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(tracer, "_trace", lambda dtype, config, generation: asked.append((dtype, json.loads(config))))
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    tracer.outline({"num_hidden_layers": 4, "layer_types": kinds, "hidden_size": 8})
    tracer.outline({"n_layer": 4, "n_embd": 8})
    assert asked == [
        ("fp32", {"num_hidden_layers": 3, "layer_types": kinds[:3], "hidden_size": 8}),
        ("fp32", {"n_layer": 1, "n_embd": 8}),
    ]


def test_genai_is_told_what_the_model_states_of_generation(tmp_path: Path) -> None:
    """Over what its configuration says; several ends of a text, the first of which pads."""
    config = transformers.LlamaConfig(hidden_size=8, num_attention_heads=2, eos_token_id=3, max_position_embeddings=64)
    transformers.GenerationConfig(eos_token_id=[5, 6], temperature=0.5, do_sample=True).save_pretrained(tmp_path)
    told = genai_config(config, tmp_path, (1, 4), ["input_ids"])
    model, search = told["model"], told["search"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, [5, 6], 5)
    assert (model["decoder"]["num_key_value_heads"], model["decoder"]["head_size"]) == (1, 4)
    assert (search["temperature"], search["do_sample"], search["top_k"], search["max_length"]) == (0.5, True, 50, 64)


def test_experts_are_refused_by_name() -> None:
    config = transformers.MixtralConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4).to_dict()
    found = obstacle("onnx-fp32", {**config, "architectures": ["MixtralForCausalLM"]})
    assert found is not None
    assert found.endswith("and its 8 experts have no product in ONNX")


def test_what_cannot_be_traced_is_refused_by_the_plan(pico_base: Path, pico_adapter: Path, tmp_path: Path) -> None:
    """A state instead of a cache, told by name; nothing is built."""
    config = transformers.MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=1, state_size=4)
    torch.manual_seed(1)
    transformers.MambaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    artifacts = ["bf16", "onnx-fp32", "onnx-int4"]
    data = {"base": str(tmp_path / "base"), "artifacts": artifacts}
    with pytest.raises(PlanRefused) as refused:
        make_plan(make_recipe(data, Path(), "test"), tmp_path / "out")
    texts = [problem.message for problem in refused.value.problems]
    assert len(texts) == 2
    assert "onnx-fp32: MambaForCausalLM is not known to the model builder, and its cache is not a key and a" in texts[0]


@pytest.mark.parametrize("rows", [None, 100])
def test_weights_of_another_model_are_told_by_name(made: Path, tmp_path: Path, rows: int | None) -> None:
    """One that is missing, and one with other rows than config.json says; no graph is left."""
    source = Path(shutil.copytree(made / "bf16", tmp_path / "source"))
    name, path = "model.layers.0.mlp.up_proj.weight", source / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    if rows:
        tensors[name] = torch.zeros(rows, 64, dtype=torch.bfloat16)
    save_file(tensors, path)
    expected = (
        rf"tensor {name} is BF16 \[100, 64\], the graph of config.json has \[64, 96\]" if rows else f"no weight {name}"
    )
    with pytest.raises(InputError, match=expected):
        trace("onnx-fp32", "fp32", source, tmp_path / "out")
    assert not (tmp_path / "out/model.onnx").exists()
