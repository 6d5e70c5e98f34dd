"""The model without weights, block by block, against the live merged model of transformers and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_export.blocks.activations import batches_of
from qlora_export.blocks.decoder import empty, give, move_buffers, open_decoder, record, require_stored
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


def test_an_architecture_whose_blocks_do_not_follow_one_another_is_refused(tmp_path: Path) -> None:
    base, adapter = save_family("llama", tmp_path)
    plan = plan_of(base, adapter, tmp_path / "out", {"format": "nf4", "rounding": "calibrated"})
    decoder = open_decoder(plan)

    class Twice(torch.nn.Module):
        """Runs its blocks on halves of the hidden states."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, **others: Any) -> Any:
            """Give the second block another width."""
            hidden = self.model.layers[0](self.model.embed_tokens(input_ids))
            return self.model.layers[1](hidden[..., :32])

    with SourceFiles() as files, torch.no_grad():
        parameters = Parameters(plan, decoder.stored_names, files)
        give(decoder.model.model.embed_tokens, "model.embed_tokens", parameters, torch.device("cpu"))
        odd = type(decoder)(Twice(decoder.model.model), decoder.place)
        with pytest.raises(Refused, match=r"Twice: its decoder blocks do not follow one another") as error:
            record(odd, torch.ones(1, 4, dtype=torch.int64))
    assert "without calibration" in error.value.hint


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
