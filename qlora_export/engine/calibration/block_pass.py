"""An artifact's way through the decoder blocks: both models side by side, each block decided and left behind.

In memory are two copies of one block, the second moments of one layer's inputs and, below a limit, the hidden states of
all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_export.blocks.activations import Activations, Batch, batches_of
from qlora_export.blocks.decoder import Call, Decoder, copy_of, empty, give, move_buffers, put, record
from qlora_export.blocks.live_parameters import Parameters
from qlora_export.engine.calibration.block import Stream, Tokens, advance, round_block
from qlora_export.engine.calibration.hessian import InputStatistics
from qlora_export.engine.calibration.layers_to_round import LayerToRound, layers_of_block, raw_parts
from qlora_export.engine.calibration.round_layer import Parts, round_layer, served
from qlora_export.engine.calibration.scale_tuning import Tuning
from qlora_export.engine.calibration.store import BlockStore, KeptBlock
from qlora_export.engine.calibration.text import CalibrationTokens
from qlora_export.planning.plan import ArtifactPlan, Plan
from qlora_export.quant.rounding.solving import Method
from qlora_export.types import Progress

ACTIVATION_BYTES = 2_000_000_000


@dataclass(frozen=True)
class CalibrationOptions:
    """Where and how calibration runs; `activation_bytes` of hidden states stay in memory."""

    out: Path
    device: str = "cpu"
    activation_bytes: int = ACTIVATION_BYTES
    method: Method = field(default_factory=Method)
    tuning: Tuning = field(default_factory=Tuning)
    progress: Progress = lambda done, total: None


class BlockRun:
    """One artifact on its way through the blocks."""

    def __init__(
        self, plan: Plan, item: ArtifactPlan, decoder: Decoder, parameters: Parameters, options: CalibrationOptions
    ) -> None:
        self._plan, self._options = plan, options
        self._decoder, self._parameters = decoder, parameters
        self._device = torch.device(options.device)
        self._batches: Sequence[Batch] = ()
        self._calls: list[list[Call]] = []
        self._hidden: tuple[Activations, Activations] | None = None
        self.subjects = {
            number: layers_of_block(block, f"{decoder.place}.{number}", item, parameters)
            for number, block in enumerate(decoder.blocks)
        }
        self._done = 0

    def start(self, tokens: CalibrationTokens) -> range:
        """Run what lies before the first block on all tokens; the numbers of the blocks."""
        self._batches = batches_of(tokens.windows)
        before = _modules_before(self._decoder)
        for name, module in before.items():
            give(module, name, self._parameters, self._device)
        move_buffers(self._decoder, self._device)
        for number, batch in enumerate(self._batches):
            hidden, calls = record(self._decoder, batch.tokens.to(self._device))
            if self._hidden is None:
                self._hidden = (self._activations(hidden), self._activations(hidden))
            self._calls.append(self._shared(number, calls))
            for activations in self._hidden:
                activations[number] = hidden
        for module in before.values():
            empty(module)
        return range(len(self._decoder.blocks))

    def block(self, number: int, store: BlockStore) -> KeptBlock:
        """Decide one block, or take what a killed run decided, and go on to the next."""
        block, prefix = self._decoder.blocks[number], f"{self._decoder.place}.{number}"
        give(block, prefix, self._parameters, self._device)
        if self._hidden is None:
            raise ValueError("start comes first")
        trained, rounded = Stream(block, self._hidden[0]), Stream(copy_of(block), self._hidden[1])
        tokens = Tokens(self._batches, [calls[number] for calls in self._calls], self._device)
        subjects = self.subjects[number]
        kept = store.load(number)
        if kept is None:
            kept = store.save(number, *self._decide(trained, rounded, tokens, subjects))
        else:
            self._take(kept, rounded, subjects)
        for stream in (trained, rounded):
            advance(stream, tokens)
        empty(block)
        return kept

    def _decide(
        self, trained: Stream, rounded: Stream, tokens: Tokens, subjects: Mapping[str, LayerToRound]
    ) -> tuple[Parts, dict[str, dict[str, Any]]]:
        parts: Parts = {}
        facts: dict[str, dict[str, Any]] = {}

        def round_one(name: str, inputs: InputStatistics) -> Tensor | None:
            subject = subjects[name]
            found = self._parameters.layer(subject.stored)
            made = round_layer(subject.form, found, inputs, self._options.method, self._compute_dtype)
            self._step()
            if isinstance(made, str):
                facts[subject.stored] = {"fallback": made}
                return None
            parts.update(made.parts)
            facts[subject.stored] = made.facts
            return subject.as_live(made.values, self._device)

        round_block(trained, rounded, tokens, list(subjects), round_one)
        return parts, facts

    def _take(self, kept: KeptBlock, rounded: Stream, subjects: Mapping[str, LayerToRound]) -> None:
        """Give the rounded block what was decided before."""
        for name, subject in subjects.items():
            self._step()
            raw = raw_parts(kept, subject)
            if raw is not None:
                values = served(subject.form, subject.spec, raw, self._compute_dtype)
                put(rounded.block, f"{name}.weight", subject.as_live(values, self._device))

    def _activations(self, hidden: Tensor) -> Activations:
        return Activations(self._batches, hidden.shape[-1], self._options.out, self._options.activation_bytes // 2)

    def _shared(self, number: int, calls: list[Call]) -> list[Call]:
        """The calls of an earlier batch of the same shape, where they are the same: masks are large."""
        shape = self._batches[number].tokens.shape
        for earlier in range(number - 1, -1, -1):
            if self._batches[earlier].tokens.shape == shape and _same(self._calls[earlier], calls):
                return self._calls[earlier]
        return calls

    def _step(self) -> None:
        self._done += 1
        self._options.progress(self._done, sum(len(subjects) for subjects in self.subjects.values()))

    @property
    def _compute_dtype(self) -> str:
        return self._plan.training.quantization.compute_dtype


def _modules_before(decoder: Decoder) -> dict[str, Any]:
    """The modules with values of their own outside the blocks, but for the output head."""
    head = decoder.model.get_output_embeddings()
    embedding = decoder.model.get_input_embeddings()
    found = {}
    for name, module in decoder.model.named_modules():
        inside = name == decoder.place or name.startswith(f"{decoder.place}.")
        own = any(True for _ in module.parameters(recurse=False))
        if own and not inside and (module is not head or module is embedding):
            found[name] = module
    return found


def _same(first: Sequence[Call], second: Sequence[Call]) -> bool:
    pairs = zip((_tensors(call) for call in first), (_tensors(call) for call in second), strict=True)
    return all(
        len(a) == len(b)
        and all(one.shape == two.shape and torch.equal(one, two) for one, two in zip(a, b, strict=True))
        for a, b in pairs
    )


def _tensors(call: Call) -> list[Tensor]:
    found: list[Tensor] = []
    for value in (*call.positional, *call.named.values()):
        found += [part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, Tensor)]
    return found
