"""The model without weights, block by block, against the live merged model of transformers and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_export.blocks.activations import batches_of
from qlora_export.blocks.decoder import Call, Decoder, empty, give, move_buffers, open_decoder, record, require_stored
from qlora_export.blocks.live_parameters import Parameters
from qlora_export.engine.calibration import block_pass
from qlora_export.engine.calibration.block import Stream, Tokens, advance, groups_of
from qlora_export.engine.calibration.block_pass import BlockRun, CalibrationOptions
from qlora_export.errors import Refused
from qlora_export.tensors.reading import SourceFiles
from tests.engine.calibration.models import FAMILIES, live_model, plan_of, save_family, windows_of

# Layers of a block in the order they are rounded in; those in a row get one input.
GROUPS = {
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "gpt_neox": [["attention.query_key_value"], ["attention.dense"], ["mlp.dense_h_to_4h"], ["mlp.dense_4h_to_h"]],
    "llama": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
    "mixtral": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]],
}


def hidden_states(model: Any, place: str, window: tuple[int, ...]) -> Any:
    """What the last block of a live model makes of one window alone."""
    found = []
    block = model.get_submodule(place)[-1]
    handle = block.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        model(input_ids=torch.tensor([window]), use_cache=False)
    handle.remove()
    return (found[0] if isinstance(found[0], torch.Tensor) else found[0][0])[0].numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_parameters_are_those_of_the_live_model(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of several lengths share batches: what fills them up changes no real token."""
    base, adapter = save_family(family, tmp_path)
    live = live_model(base, adapter)
    plan = plan_of(base, adapter, tmp_path / "out", {"format": "nf4", "rounding": "calibrated"})
    monkeypatch.setattr(block_pass, "batches_of", lambda windows: batches_of(windows, 40))
    tokens = windows_of(9)
    decoder = open_decoder(plan)
    assert all(parameter.is_meta for parameter in decoder.model.parameters())
    with SourceFiles() as files, torch.no_grad():
        parameters = Parameters(plan, decoder.stored_names, files)
        require_stored(decoder, parameters, plan.checkpoint.folder)
        for name, expected in live.state_dict().items():
            if parameters.has(name):
                np.testing.assert_allclose(parameters.trained(name), expected.numpy(), atol=2e-6, err_msg=name)
        run = BlockRun(plan, plan.artifacts[0], decoder, parameters, CalibrationOptions(tmp_path))
        run.start(tokens)
        assert len(run._batches) > 2
        assert any(not batch.valid.all() for batch in run._batches)
        assert run._hidden is not None
        for number, block in enumerate(decoder.blocks):
            give(block, f"{decoder.place}.{number}", parameters, torch.device("cpu"))
            stream = Stream(block, run._hidden[0])
            whole = Tokens(run._batches, [calls[number] for calls in run._calls], torch.device("cpu"))
            if number == 0 and family in GROUPS:
                assert groups_of(stream, whole, list(run.subjects[0])) == GROUPS[family]
            advance(stream, whole)
    windows = sorted(tokens.windows, key=len, reverse=True)
    for number, batch in enumerate(run._batches):
        for row in range(len(batch.tokens)):
            window = windows.pop(0)
            expected = hidden_states(live, decoder.place, window)
            found = run._hidden[0][number][row, : len(window)].numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


class Rowed(torch.nn.Module):
    """An embedding and two blocks; how the second is called is the test's."""

    def __init__(self, between: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(9, 8)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])
        self.between = between

    def forward(self, input_ids: Any, **others: Any) -> Any:
        """Hand what the first block gives to the second as the test says."""
        return self.between(self.layers[1], self.layers[0](self.embed_tokens(input_ids)))


def unpacked(block: Any, given: Any) -> Any:
    """Of a block that gives two values."""
    hidden, _ = given
    return block(hidden)


def recorded(between: Callable[[Any, Any], Any], batch: int) -> Any:
    """What is recorded of such a model, and its blocks put back."""
    model = Rowed(between)
    blocks = model.layers
    try:
        return model, record(Decoder(model, "layers"), torch.ones(batch, 4, dtype=torch.int64))
    finally:
        assert model.layers is blocks


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_model_takes_hidden_states_or_the_first_of_a_tuple(batch: int) -> None:
    for between in (lambda block, given: block(given, 7, scale=2), lambda block, given: block(given[0], 7, scale=2)):
        model, (hidden, calls) = recorded(between, batch)
        assert type(hidden) is torch.Tensor
        assert torch.equal(hidden, model.embed_tokens(torch.ones(batch, 4, dtype=torch.int64)))
        assert calls == [Call((), {}), Call((7,), {"scale": 2})]


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(
    "between",
    [
        lambda block, given: block(given[..., :4]),
        lambda block, given: block(given * 2),
        lambda block, given: block(given[0], given[1]),
        lambda block, given: block((given,)),
        lambda block, given: block(input=given),
        lambda block, given: given,
        unpacked,
    ],
    ids=["cut", "scaled", "two values", "a tuple", "by name", "left out", "unpacked"],
)
def test_an_architecture_whose_blocks_do_not_follow_one_another_is_refused(
    between: Callable[[Any, Any], Any], batch: int
) -> None:
    with pytest.raises(Refused, match=r"Rowed: its decoder blocks do not follow one another") as error:
        recorded(between, batch)
    assert "without calibration" in error.value.hint


@pytest.mark.parametrize("kind", [AttributeError, IndexError, RuntimeError, TypeError, ValueError])
@pytest.mark.parametrize("place", ["before", "between"])
def test_a_bug_in_a_layer_is_no_architecture_to_refuse(
    kind: type[Exception], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*given: Any) -> Any:
        raise kind("a bug")

    if place == "before":
        monkeypatch.setattr(torch.nn.Embedding, "forward", bug)
    with pytest.raises(kind, match="a bug"):
        recorded(bug, 2)


def test_buffers_move_and_stay_when_weights_go(tmp_path: Path) -> None:
    """The scale of Gemma's embedding is no stored value: it may not go with the weights."""
    base, adapter = save_family("gemma2", tmp_path)
    plan = plan_of(base, adapter, tmp_path / "out", {"format": "nf4", "rounding": "calibrated"})
    decoder = open_decoder(plan)
    embedding = decoder.model.get_input_embeddings()
    with SourceFiles() as files, torch.no_grad():
        parameters = Parameters(plan, decoder.stored_names, files)
        give(embedding, "model.embed_tokens", parameters, torch.device("cpu"))
        empty(embedding)
    assert embedding.weight.is_meta
    assert embedding.embed_scale == pytest.approx(8)
    move_buffers(decoder, torch.device("meta"))
    assert embedding.embed_scale.is_meta
