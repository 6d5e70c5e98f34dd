from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_export.drift.layer_difference import Difference
from qlora_export.drift.recording import Recording
from qlora_export.drift.trace import Trace, TracedError, broken_among, record, trace
from qlora_export.pipeline import release as pipeline
from qlora_export.pipeline.options import RunOptions
from qlora_export.recipe.load import make_recipe
from qlora_export.runtimes.as_trained import open_as_trained
from qlora_export.runtimes.base import TracedLayer, TracedSession
from qlora_export.runtimes.loading import load_model
from qlora_export.runtimes.registry import load_runtime
from qlora_export.runtimes.session import ModelSession
from qlora_export.sources.adapter import open_adapter
from qlora_export.sources.checkpoint import open_checkpoint
from qlora_export.sources.sidecar import read_sidecar
from tests.helpers.files import edit_json, edit_tensors
from tests.helpers.pico import DEMO
from tests.helpers.zoo import ARCHITECTURES, TOKENS, save_architecture

WINDOWS = [tuple(range(5, 105)), tuple(range(900, 1000)), tuple(range(1990, 2046))]
HEAD = 64
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base, without its adapter, as some artifacts."""
    out = tmp_path_factory.mktemp("traced")
    artifacts = ["bf16", "int8", "nf4", "w4a16"]
    data = {"base": str(DEMO / "base"), "training_quantization": "none", "artifacts": artifacts}
    pipeline.build(make_recipe(data, Path(), "test"), RunOptions(out, workers=1))
    return out


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    with (
        Recording(tmp_path_factory.mktemp("recording")) as found,
        load_runtime("transformers").open(DEMO / "base") as session,
    ):
        assert isinstance(session, TracedSession)
        record(session, WINDOWS, found)
        yield found


def traced(folder: Path, recording: Recording) -> Trace:
    with load_runtime("transformers").open(folder) as session:
        assert isinstance(session, TracedSession)
        return trace(session, WINDOWS, recording)


def broken_in(folder: Path, recording: Recording) -> str | None:
    found = traced(folder, recording).broken
    return found.name if found else None


def test_each_layer_is_named_and_a_sound_artifact_has_no_broken_one(built: Path, recording: Recording) -> None:
    largest = {}
    for name in ("bf16", "int8", "nf4", "w4a16"):
        found = traced(built / name, recording)
        assert found.broken is None, found.broken
        assert [layer.name for layer in found.layers] == [
            "model.embed_tokens", "model.rotary_emb", *(f"model.layers.{number}" for number in range(4)), "model.norm",
            "lm_head",
        ]  # fmt: skip
        largest[name] = max(layer.error for layer in found.layers)
    assert largest["bf16"] == 0
    assert 0 < largest["int8"] < 0.05
    assert largest["int8"] < largest["w4a16"] < 0.3
    assert largest["int8"] < largest["nf4"] < 0.3


def scaled(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            tensors[name] = (tensors[name].float() * 1.05).to(tensors[name].dtype)

    return change


def scaled_nf4(module: str) -> Callable[[Tensors], None]:
    """Both levels of the absmax: codes times the nested absmax, and the offset in the state."""

    def change(tensors: Tensors) -> None:
        scaled(f"{module}.weight.nested_absmax")(tensors)
        name = f"{module}.weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[name].tolist()))
        state["nested_offset"] *= 1.05
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def swapped_rows(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            heads = tensors[name].clone()
            tensors[name][:HEAD], tensors[name][HEAD : 2 * HEAD] = heads[HEAD : 2 * HEAD], heads[:HEAD]

    return change


def swapped_columns(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        heads = tensors[name].clone()
        tensors[name][:, :HEAD], tensors[name][:, HEAD : 2 * HEAD] = heads[:, HEAD : 2 * HEAD], heads[:, :HEAD]

    return change


QUERY, OUTPUT = "model.layers.2.self_attn.q_proj", "model.layers.1.self_attn.o_proj"
DOWN = "model.layers.0.mlp.down_proj"
NORM = "model.layers.3.post_attention_layernorm"
DEFECTS: Mapping[str, tuple[str, str, Callable[[Tensors], None]]] = {
    "the scales of a query in nf4": ("nf4", QUERY, scaled_nf4(QUERY)),
    "the scales of a query in w4a16": ("w4a16", QUERY, scaled(f"{QUERY}.weight_scale")),
    "the scales of the last matrix of a block in nf4": ("nf4", DOWN, scaled_nf4(DOWN)),
    "two heads of a query": ("w4a16", QUERY, swapped_rows(f"{QUERY}.weight_packed", f"{QUERY}.weight_scale")),
    "two heads before the output": ("bf16", OUTPUT, swapped_columns(f"{OUTPUT}.weight")),
    "a norm in a block": ("nf4", NORM, scaled(f"{NORM}.weight")),
    "the final norm": ("w4a16", "model.norm", scaled("model.norm.weight")),
}


@pytest.mark.parametrize("case", DEFECTS)
def test_a_planted_defect_is_named(case: str, built: Path, recording: Recording, tmp_path: Path) -> None:
    artifact, name, change = DEFECTS[case]
    folder = Path(shutil.copytree(built / artifact, tmp_path / artifact))
    edit_tensors(folder / "model.safetensors", change)
    found = traced(folder, recording).broken
    assert found is not None
    assert found.name == name
    assert found.error > 3 * found.usual


def test_another_rope_theta_is_told_from_broken_layers(built: Path, recording: Recording, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built / "nf4", tmp_path / "nf4"))
    edit_json(folder / "config.json", rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})
    assert broken_in(folder, recording) == "model.rotary_emb"


def test_weights_that_are_no_numbers_are_named(built: Path, recording: Recording, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built / "bf16", tmp_path / "bf16"))

    def change(tensors: Tensors) -> None:
        tensors[f"{DOWN}.weight"][3, 5] = float("nan")

    edit_tensors(folder / "model.safetensors", change)
    assert broken_in(folder, recording) == DOWN


def test_blocks_are_compared_on_the_inputs_of_the_reference(built: Path, recording: Recording) -> None:
    """What a block of the candidate makes of the reference's hidden states, called by hand."""
    session = ModelSession(load_model(DEMO / "base", dtype="auto").float())
    kept: dict[str, Any] = {}
    session.trace(WINDOWS[0], ["model.layers.1"], lambda name, inputs, outputs: kept.update(inputs=inputs, out=outputs))
    with load_runtime("transformers").open(built / "int8") as opened:
        assert isinstance(opened, ModelSession)
        model = opened._model
        hidden = torch.from_numpy(kept["inputs"].copy())[None]
        places = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        with torch.no_grad():
            by_hand = model.model.layers[1](hidden, position_embeddings=places)[0].numpy()
        found = next(layer for layer in trace(opened, WINDOWS[:1], recording).layers if layer.name == "model.layers.1")
    added = np.linalg.norm(kept["out"] - kept["inputs"], axis=1)
    expected = (np.linalg.norm(by_hand - kept["out"], axis=1) / np.maximum(added, np.median(added))).mean()
    assert found.error == pytest.approx(expected, rel=1e-3)


def test_a_live_adapter_has_the_names_of_the_model(
    pico_base: Path, pico_adapter: Path, tmp_path: Path, pico_recipe: Any
) -> None:
    live = open_as_trained(open_checkpoint(pico_base), open_adapter(pico_adapter), read_sidecar(pico_adapter)).tuned()
    assert isinstance(live, TracedSession)
    pipeline.build(pico_recipe("bf16"), RunOptions(tmp_path, workers=1))
    with Recording(tmp_path) as recording:
        record(live, WINDOWS, recording)
        with load_runtime("transformers").open(tmp_path / "bf16") as session:
            assert isinstance(session, TracedSession)
            assert [layer.name for layer in session.layers()] == [layer.name for layer in live.layers()]
            found = trace(session, WINDOWS, recording)
    assert found.broken is None
    assert len(found.layers) == 6
    assert 0 < max(layer.error for layer in found.layers) < 0.01


@pytest.mark.parametrize("name", [name for name, entry in ARCHITECTURES.items() if entry.task == "CAUSAL_LM"])
def test_every_architecture_is_itself(name: str, tmp_path: Path) -> None:
    """Each layer on its own recorded inputs gives its own outputs, and no weight of a block is left out."""
    model = load_model(save_architecture(name, tmp_path / "base", seed=3))
    session = ModelSession(model)
    blocks = {layer.block for layer in session.layers() if layer.block}
    assert len(blocks) == 2
    within = [f"{layer.name}." for layer in session.layers() if layer.block not in (None, layer.name)]
    weights = [weight for weight, _ in model.named_parameters() if any(weight.startswith(f"{one}.") for one in blocks)]
    assert weights
    assert [weight for weight in weights if not any(weight.startswith(part) for part in within)] == []
    with Recording(tmp_path) as recording:
        record(session, [tuple(TOKENS)], recording)
        found = trace(session, [tuple(TOKENS)], recording)
    assert found.broken is None
    assert blocks < {layer.name for layer in found.layers}
    assert max(layer.error for layer in found.layers) < 1e-5


def layers_of(*errors: float, gains: tuple[float, ...] = (), kind: str = "Linear") -> list[TracedError]:
    gains = gains or (1.0,) * len(errors)
    return [
        TracedError(TracedLayer(f"b.{number}.q", kind, f"b.{number}"), error, gain)
        for number, (error, gain) in enumerate(zip(errors, gains, strict=True))
    ]


def test_what_stands_out_is_broken() -> None:
    assert broken_among(layers_of(0.1, 0.12, 0.08, 0.39)) is None
    found = broken_among(layers_of(0.1, 0.12, 0.08, 0.41))
    assert found is not None
    assert (found.name, found.error, found.usual) == ("b.3.q", 0.41, 0.1)
    assert broken_among(layers_of(0, 0, 0, 0.02)) is None
    turned = broken_among(layers_of(0.1, 0.1, 0.1, 0.1, gains=(0.99, 0.992, 1.035, 0.991)))
    assert turned is not None
    assert turned.name == "b.2.q"
    assert turned.error == pytest.approx(0.044)
    assert broken_among(layers_of(0.1, 0.1, 0.1, 0.1, gains=(0.99, 0.992, 1.015, 0.991))) is None


def test_a_single_layer_in_few_bits_is_no_broken_one() -> None:
    lone = layers_of(0.12, kind="Linear int4")
    assert broken_among([*lone, *layers_of(0.005, 0.006, 0.007, kind="Linear int8")]) is None


def test_a_block_is_named_where_none_of_its_layers_is() -> None:
    blocks = [TracedError(TracedLayer(f"b.{number}", "Block", f"b.{number}"), 0.1, 1.0) for number in range(3)]
    broken = TracedError(TracedLayer("b.3", "Block", "b.3"), 0.9, 1.0)
    sound = layers_of(0.1, 0.1, 0.1, 0.1)
    named = broken_among([*blocks, broken, *sound])
    assert named is not None
    assert named.name == "b.3"
    part = broken_among([*blocks, broken, *layers_of(0.1, 0.1, 0.1, 0.5)])
    assert part is not None
    assert part.name == "b.3.q"


def test_tokens_to_which_a_layer_adds_little_or_much_do_not_decide() -> None:
    reference = np.ones((100, 4), np.float32)
    reference[0] *= 1e4
    reference[1] *= 1e-6
    candidate = reference * 1.1
    candidate[1] += 0.1
    difference = Difference()
    difference.add(candidate.astype(np.float32), reference)
    assert difference.error == pytest.approx(0.1, rel=1e-2)
    difference.add(np.ones((1, 4), np.float32), np.zeros((1, 4), np.float32))
    assert difference.error == pytest.approx(0.11, rel=2e-2)
