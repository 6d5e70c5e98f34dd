"""The reference: the model that was trained, as its training saw it, in transformers, bitsandbytes and peft.

The base is quantised to 4 bits by bitsandbytes while it loads, with one torch thread (its mean of the absmax depends on
their number), and the adapter stays live. The same model without the adapter, and with every delta merged into a weight
of the storage dtype, give the other rows of the ledger. Where bitsandbytes on this machine makes the state of training
by itself, nothing of our own engine takes part, so it is an oracle.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import bitsandbytes
import numpy as np
import torch
import transformers

from qlora_export.errors import InputError
from qlora_export.merge.module_names import Names, names_of
from qlora_export.quant import double_quant, four_bit
from qlora_export.runtimes.base import Session
from qlora_export.runtimes.classifier import session_of
from qlora_export.runtimes.loading import (
    TORCH_DTYPES,
    attach_adapter,
    load_model,
    pin_weights,
    placed,
    widen_dense,
)
from qlora_export.runtimes.lora_layers import adapted_layers, merged_forward, pin_dora
from qlora_export.sources.adapter import Adapter
from qlora_export.sources.architecture import CLASSIFIER_HEADS
from qlora_export.sources.checkpoint import Checkpoint
from qlora_export.sources.live_model import trained_module
from qlora_export.tensors.dtypes import round_to
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import Float32, TrainedModule, TrainingQuantization


@dataclass(frozen=True)
class AsTrained:
    """The live model of training."""

    model: Any
    training: TrainingQuantization

    def tuned(self) -> Session:
        """With the live adapter: the reference."""
        return session_of(self.model)

    @contextmanager
    def base(self) -> Iterator[Session]:
        """Without the adapter."""
        with self.model.disable_adapter():
            yield session_of(self.model)

    @contextmanager
    def merged(self) -> Iterator[Session]:
        """With every linear layer's delta added to its weight and rounded once to the storage dtype."""
        before = {layer: layer.__dict__.get("forward") for layer in adapted_layers(self.model)}
        roundings = [TORCH_DTYPES[dtype] for dtype in self.training.weight_roundings]
        for layer in before:
            layer.forward = partial(merged_forward, layer, roundings, TORCH_DTYPES[self.training.storage_dtype])
        try:
            yield session_of(self.model)
        finally:
            for layer, forward in before.items():
                del layer.forward
                if forward is not None:
                    layer.forward = forward


def open_as_trained(
    base: Checkpoint,
    adapter: Adapter,
    training: TrainingQuantization,
    vocabulary: int | None = None,
    device: str = "cpu",
) -> AsTrained:
    """Load base and adapter as in training; raises InputError when the base is not the one of the sidecar.

    `vocabulary` is the number of rows that the embedding was resized to in training. Quantised on the CPU, by the rules
    of training, the model then computes on the device.
    """
    options: dict[str, Any] = {}
    heads = CLASSIFIER_HEADS if adapter.classifier else ("lm_head",)
    if training.provenance != "base" and training.quant_type == "nf4" and _plain(base):
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=training.quant_type,
            bnb_4bit_use_double_quant=training.double_quant,
            bnb_4bit_compute_dtype=TORCH_DTYPES[training.compute_dtype],
            llm_int8_skip_modules=[*training.skip, *heads] if training.skip else None,
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = load_model(base.folder, adapter.labels, dtype=TORCH_DTYPES[training.storage_dtype], **options)
    finally:
        torch.set_num_threads(threads)
    if _plain(base):
        _give_recorded_state(model, names_of(base, adapter.classifier, _weights_of(training)), training)
    # peft loads saved modules into copies of the base's: wide ones, so that nothing the adapter holds is rounded.
    widen_dense(model)
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    model = attach_adapter(model, adapter.folder)
    widen_dense(model)
    roundings = [TORCH_DTYPES[dtype] for dtype in training.weight_roundings]
    pin_weights(model, roundings)
    pin_dora(model, roundings)
    return AsTrained(placed(model, device), training)


def _plain(base: Checkpoint) -> bool:
    return all(weight.storage == "plain" for weight in base.weights.values())


def _weights_of(training: TrainingQuantization) -> list[str]:
    return [f"{name}.weight" for name in training.modules]


def _give_recorded_state(model: Any, names: Names, training: TrainingQuantization) -> None:
    """Make every layer hold the codes and absmax of the sidecar; raises InputError when that cannot be.

    bitsandbytes rounds the 8-bit absmax otherwise on a CPU than on the GPU that trained, and sums its mean in another
    order. Then the state is computed from the base by the recorded rules, and taken if it has the recorded hash.
    """
    with SourceFiles() as files:
        for name, layer in model.named_modules():
            recorded = training.modules.get(name)
            if not isinstance(layer, bitsandbytes.nn.Linear4bit) or recorded is None:
                continue
            found = trained_module(name, layer)
            if found.codes_sha256 == recorded.codes_sha256 and found != recorded:
                stored = f"{names.stored_module(name) or name}.weight"
                values = files.values(names.checkpoint.tensors[stored])
                _replace_absmax(layer, values.T if stored in names.input_major else values, training, recorded)
                found = trained_module(name, layer)
            if found != recorded:
                what = "codes" if found.codes_sha256 != recorded.codes_sha256 else "absmax state"
                raise InputError(
                    f"{name}: bitsandbytes quantises this base to another {what} than in training",
                    "give the base that the adapter was trained on",
                )


def _replace_absmax(layer: Any, values: Float32, training: TrainingQuantization, recorded: TrainedModule) -> None:
    """Give a layer the double-quantised absmax that its base has by the recorded rules."""
    if recorded.nested_offset is None:
        return
    stored = round_to(values.reshape(-1), training.storage_dtype)
    absmax = np.empty(-(-stored.size // training.block_size), np.float32)
    four_bit.block_absmax(stored, training.block_size, absmax)
    offset = np.float32(recorded.nested_offset)
    codes, nested_absmax = double_quant.encode(absmax, offset, training.exact_nested)
    state = layer.weight.quant_state
    state.absmax = torch.from_numpy(codes)
    state.state2.absmax = torch.from_numpy(nested_absmax)
    state.offset = torch.tensor(float(offset))
