"""The whole model in memory, trained and rounded, to tune the scales of what was decided block by block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from qlora_export.blocks.activations import Batch, batches_of
from qlora_export.blocks.decoder import Decoder, give
from qlora_export.blocks.live_parameters import Parameters
from qlora_export.engine.calibration.block_pass import CalibrationOptions
from qlora_export.engine.calibration.layers_to_round import LayerToRound, raw_parts
from qlora_export.engine.calibration.round_layer import Parts, assembled, stored_grid
from qlora_export.engine.calibration.scale_tuning import TunedLayer, tune
from qlora_export.engine.calibration.store import KeptBlock
from qlora_export.engine.calibration.text import CalibrationTokens
from qlora_export.types import TORCH_NAMES

Facts = dict[str, dict[str, Any]]


def tuned(
    decoder: Decoder,
    parameters: Parameters,
    blocks: Mapping[int, Mapping[str, LayerToRound]],
    kept: KeptBlock,
    tokens: CalibrationTokens,
    options: CalibrationOptions,
    compute_dtype: str,
) -> tuple[Parts, Facts]:
    """The parts of the layers of all blocks with their scales tuned on the whole model, and what tuning brought."""
    subjects = {
        f"{decoder.place}.{number}.{name}": subject
        for number, found in blocks.items()
        for name, subject in found.items()
    }
    device = torch.device(options.device)
    model = _trained_model(decoder, parameters, device)
    layers = {
        name: _tuned_layer(subject, raw, compute_dtype, device)
        for name, subject in subjects.items()
        if (raw := raw_parts(kept, subject)) is not None
    }
    batches = [
        Batch(batch.tokens.to(device), batch.valid.to(device))
        for batch in batches_of(tokens.windows, options.tuning.batch_tokens)
    ]
    result = tune(model, layers, batches, options.tuning, options.progress)
    parts: Parts = {}
    for name, layer in layers.items():
        subject = subjects[name]
        parts |= assembled(subject.form, subject.spec, layer.grid, layer.codes, result.scales[name])
    facts = {"mean_kl_before_nats": result.before, "mean_kl_after_nats": result.after, "step": result.step}
    return parts, {"tuning": facts}


def _trained_model(decoder: Decoder, parameters: Parameters, device: torch.device) -> Any:
    model = decoder.model
    give(model, "", parameters, device)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight.is_meta:
        head.weight = embedding.weight
    return model.to(device)


def _tuned_layer(subject: LayerToRound, raw: Parts, compute_dtype: str, device: torch.device) -> TunedLayer:
    chosen, level_grid = subject.form.chosen(subject.spec, raw), subject.form.grid(subject.spec)
    if level_grid is None:
        raise ValueError(f"{subject.stored}: decided without a grid")
    return TunedLayer(
        stored_grid(level_grid, chosen),
        torch.from_numpy(chosen.codes.astype(np.int32)).to(device),
        torch.from_numpy(np.array(chosen.scales)).to(device),
        getattr(torch, TORCH_NAMES[compute_dtype]),
        subject.turned,
    )
