"""Tuning of scales: the codes stay, the scales move so that the whole model says again what the trained one says.

    minimise over the scales   mean over tokens of KL(trained || rounded),   weights = levels[codes] * round(scales)

Gradients pass the rounding of scales and of weights as if it were not there. Every eighth sequence is held out: the
scales of the step with the lowest divergence there are kept, those of the start included. Source: block-wise scale
training as in EfficientQAT (arXiv 2407.11062), with the loss of QAD (arXiv 2601.20088). Memory: the model twice in
float32 and its gradients, so small models on a processor, real ones on an accelerator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_export.blocks.activations import Batch
from qlora_export.quant.rounding.grid import Grid
from qlora_export.types import Progress

HELD_OUT = 8


@dataclass(frozen=True)
class Tuning:
    """Adam's peak rate, relative to the scales, the number of steps, and about how many tokens each looks at."""

    steps: int = 150
    rate: float = 3e-3
    batch_tokens: int = 1024
    looks: int = 5


@dataclass(frozen=True)
class TunedLayer:
    """A layer whose scales [blocks, groups] move: grid, codes [rows, columns]; `turned` ones store [in, out]."""

    grid: Grid
    codes: Tensor
    scales: Tensor
    dtype: torch.dtype
    turned: bool

    def weight(self, factors: Tensor) -> Tensor:
        """The live weight with every scale times its factor."""
        scales = self.scales * factors
        stored = scales + (self.grid.rule(scales) - scales).detach()
        values = self.grid.decode(self.codes, stored)
        values = values + (values.detach().to(self.dtype).float() - values.detach())
        return values.T if self.turned else values


@dataclass(frozen=True)
class Tuned:
    """Scales as they are stored by layer, and the divergence on what was held out, before and after, in nats."""

    scales: dict[str, Tensor]
    before: float
    after: float
    step: int


def tune(
    model: Any, layers: Mapping[str, TunedLayer], batches: Sequence[Batch], tuning: Tuning, progress: Progress
) -> Tuned:
    """Tune the scales of the layers, by the names they have in the model, which holds the trained weights."""
    trained = {name: model.get_submodule(name).weight.data for name in layers}
    factors = {name: torch.ones_like(layer.scales, requires_grad=True) for name, layer in layers.items()}
    held, used = batches[::HELD_OUT], [batch for number, batch in enumerate(batches) if number % HELD_OUT]
    used = used or list(held)
    optimiser = torch.optim.Adam(factors.values(), lr=tuning.rate)
    divergence = _Divergence(model, layers, trained)
    before = divergence.mean(held, factors)
    best = (before, 0, {name: factor.detach().clone() for name, factor in factors.items()})
    looks = {round(tuning.steps * (look + 1) / tuning.looks) for look in range(tuning.looks)}
    for step, batch in zip(range(1, tuning.steps + 1), _endless(used), strict=False):
        for group in optimiser.param_groups:
            group["lr"] = tuning.rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / tuning.steps))
        optimiser.zero_grad()
        with torch.enable_grad():
            total, count = divergence.of(batch, factors)
            (total / count).backward()
        optimiser.step()
        if step in looks and (found := divergence.mean(held, factors)) < best[0]:
            best = (found, step, {name: factor.detach().clone() for name, factor in factors.items()})
        progress(step, tuning.steps)
    divergence.restore()
    after, step, kept = best
    scales = {name: layer.grid.rule(layer.scales * kept[name]) for name, layer in layers.items()}
    return Tuned(scales, before, after, step)


class _Divergence:
    """KL(trained || rounded) on batches, by giving one model the one and the other weights in turn."""

    def __init__(self, model: Any, layers: Mapping[str, TunedLayer], trained: Mapping[str, Tensor]) -> None:
        self._model, self._layers, self._trained = model, layers, trained
        for name in layers:
            module = model.get_submodule(name)
            del module._parameters["weight"]
            module.weight = trained[name]

    def of(self, batch: Batch, factors: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """The sum over the tokens of a batch, with gradients where they are enabled, and the number of tokens."""
        with torch.no_grad():
            self._give(self._trained)
            wanted = self._log_probabilities(batch)
        self._give({name: layer.weight(factors[name]) for name, layer in self._layers.items()})
        found = self._log_probabilities(batch)
        return (wanted.exp() * (wanted - found)).sum(), len(wanted)

    def mean(self, batches: Sequence[Batch], factors: Mapping[str, Tensor]) -> float:
        """The mean over the tokens of batches."""
        with torch.no_grad():
            found = [self.of(batch, factors) for batch in batches]
        return float(sum(total for total, _ in found)) / max(sum(count for _, count in found), 1)

    def restore(self) -> None:
        """Make the trained weights parameters again."""
        for name, values in self._trained.items():
            module = self._model.get_submodule(name)
            del module.weight
            module.weight = nn.Parameter(values, requires_grad=False)

    def _give(self, weights: Mapping[str, Tensor]) -> None:
        for name, values in weights.items():
            self._model.get_submodule(name).weight = values

    def _log_probabilities(self, batch: Batch) -> Tensor:
        logits = self._model(input_ids=batch.tokens, use_cache=False).logits
        return torch.log_softmax(logits[batch.valid].float(), dim=-1)


def _endless(batches: Sequence[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches
