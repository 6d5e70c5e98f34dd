"""One decoder block: its linear layers are rounded in the order they are called, each seeing those before it rounded.

    for each group of layers with one input:
        trained block -> x_trained,  rounded block so far -> x,  on every batch:  H, C
        round the layers of the group, and put what serving will multiply with into the rounded block

Cost: a pass over the calibration tokens through both blocks for every group, cut short where the group is reached, and
one whole pass for the next block's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_export.blocks.activations import Activations, Batch
from qlora_export.blocks.decoder import Call, run
from qlora_export.engine.calibration.hessian import InputStatistics


@dataclass(frozen=True)
class Stream:
    """A block of one of the two models, and the hidden states it gets."""

    block: Any
    hidden: Activations


@dataclass(frozen=True)
class Tokens:
    """The batches, and how this block is called on each."""

    batches: Sequence[Batch]
    calls: Sequence[Call]
    device: torch.device

    def run(self, stream: Stream, number: int) -> Tensor:
        """What the block makes of a batch, whose hidden states it may write to."""
        with torch.no_grad():
            return run(stream.block, stream.hidden[number].to(self.device, copy=True), self.calls[number])


class _Enough(Exception):
    """What was to be seen was seen."""


def round_block(
    trained: Stream,
    rounded: Stream,
    tokens: Tokens,
    names: Sequence[str],
    round_one: Callable[[str, InputStatistics], Tensor | None],
) -> None:
    """Round the linear layers of these names within the block.

    `round_one` is told a name and the statistics of its inputs, and gives the weight to go on with, in the layout of
    the live parameter; None leaves the trained one. Layers that no batch reaches are told with statistics of no token.
    """
    groups = groups_of(rounded, tokens, names)
    for group in groups:
        columns = _columns(rounded.block.get_submodule(group[0]))
        inputs = InputStatistics(columns, tokens.device)
        for number in range(len(tokens.batches)):
            seen = input_of(rounded, tokens, number, group[0])
            if seen is not None:
                other = input_of(trained, tokens, number, group[0])
                inputs.add(seen, other if other is not None else seen)
        for name in group:
            _give(rounded.block, name, round_one(name, inputs))
    reached = {name for group in groups for name in group}
    for name in names:
        if name not in reached:
            columns = _columns(rounded.block.get_submodule(name))
            _give(rounded.block, name, round_one(name, InputStatistics(columns, tokens.device)))


def advance(stream: Stream, tokens: Tokens) -> None:
    """Put the block's outputs in the place of its inputs."""
    for number in range(len(tokens.batches)):
        stream.hidden[number] = tokens.run(stream, number)


def groups_of(stream: Stream, tokens: Tokens, names: Sequence[str]) -> list[list[str]]:
    """The layers in the order of their first call, those together that get one and the same input."""
    order: dict[str, tuple[Any, ...]] = {}
    kept: list[Tensor] = []

    def hook(name: str) -> Callable[[Any, Any], None]:
        def see(module: Any, arguments: Any) -> None:
            if name not in order:
                # Kept alive, so that no later input takes the same place in memory.
                kept.append(arguments[0])
                order[name] = (arguments[0].data_ptr(), arguments[0].shape, arguments[0].stride())

        return see

    handles = [stream.block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        for number in range(len(tokens.batches)):
            tokens.run(stream, number)
            if len(order) == len(names):
                break
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, place in order.items():
        groups.setdefault(place, []).append(name)
    return list(groups.values())


def input_of(stream: Stream, tokens: Tokens, number: int, name: str) -> Tensor | None:
    """The inputs [tokens, columns] of one layer on one batch, without filling; None when it is not called."""
    found: list[Tensor] = []

    def see(module: Any, arguments: Any) -> None:
        found.append(arguments[0])
        raise _Enough

    handle = stream.block.get_submodule(name).register_forward_pre_hook(see)
    try:
        tokens.run(stream, number)
    except _Enough:
        pass
    finally:
        handle.remove()
    if not found:
        return None
    rows = found[0].reshape(-1, found[0].shape[-1])
    valid = tokens.batches[number].valid.reshape(-1).to(rows.device)
    return rows[valid] if len(valid) == len(rows) else rows


def _give(block: Any, name: str, values: Tensor | None) -> None:
    if values is not None:
        block.get_submodule(name).weight.data = values


def _columns(module: Any) -> int:
    """Number of inputs; a Conv1D stores [in, out]."""
    return int(module.weight.shape[0] if hasattr(module, "nf") else module.weight.shape[1])
