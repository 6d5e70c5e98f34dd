"""The live model as a row of decoder blocks, without memory for its weights: they come and go block by block.

transformers builds the model from config.json on the meta device; only its buffers (frequencies, scales of embeddings)
are real, in the dtype that training loaded them in. What the model hands to its blocks besides hidden states (masks,
positions) is recorded by running it with recorders in place of the blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import initialization

from qlora_export.blocks.live_parameters import Parameters
from qlora_export.errors import Refused
from qlora_export.planning.plan import Plan
from qlora_export.sources.architecture import live_config
from qlora_export.sources.live_model import decoder_place
from qlora_export.types import TORCH_NAMES


@dataclass(frozen=True)
class Call:
    """What a block gets beside the hidden states."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]


@dataclass(frozen=True)
class Decoder:
    """A causal language model without weights, and where its decoder blocks are."""

    model: Any
    place: str

    @property
    def blocks(self) -> Any:
        """The decoder blocks, a ModuleList."""
        return self.model.get_submodule(self.place)

    @property
    def stored_names(self) -> list[str]:
        """Names of the parameters and of the buffers that are stored."""
        return list(self.model.state_dict())


def open_decoder(plan: Plan) -> Decoder:
    """Build the model of a plan; raises Refused for one that is no row of decoder blocks."""
    config = live_config(plan.checkpoint)
    rows = plan.model.settings.get("vocab_size")
    if isinstance(rows, int):
        config.get_text_config().vocab_size = rows
    dtype = getattr(torch, TORCH_NAMES[plan.training.quantization.storage_dtype])
    transformers.utils.logging.set_verbosity_error()
    with initialization.no_init_weights(), init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                module.register_buffer(name, buffer.float(), name not in module._non_persistent_buffers_set)
    place = decoder_place(model)
    if place is None:
        count = config.get_text_config().num_hidden_layers
        raise Refused(
            f"{plan.checkpoint.folder}: {type(model).__name__} has no row of {count} decoder blocks",
            "calibrated rounding works block by block; round without calibration",
        )
    return Decoder(model, place)


def give(module: Any, prefix: str, parameters: Parameters, device: torch.device) -> None:
    """Give a module, whose name in the model is `prefix`, the values of the trained model."""
    for name in module.state_dict():
        live = f"{prefix}.{name}" if prefix else name
        if parameters.has(live):
            put(module, name, torch.from_numpy(parameters.trained(live)).to(device, copy=True))


def put(module: Any, name: str, values: Tensor) -> None:
    """Put values in the place of a parameter or buffer."""
    owner_name, _, last = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if last in owner._parameters:
        owner._parameters[last] = nn.Parameter(values, requires_grad=False)
    else:
        owner._buffers[last] = values


def empty(module: Any) -> None:
    """Take a module's values away, but for buffers that are not stored: nobody could give those back."""
    for name, values in module.state_dict().items():
        put(module, name, torch.empty_like(values, device="meta"))


def move_buffers(decoder: Decoder, device: torch.device) -> None:
    """Bring what the model has beside stored values to a device."""
    for module in decoder.model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def require_stored(decoder: Decoder, parameters: Parameters, folder: Path) -> None:
    """Raise Refused for a block with a parameter that is no stored tensor, nor made of experts stored one by one."""
    for name, _ in decoder.blocks.named_parameters():
        live = f"{decoder.place}.{name}"
        if not parameters.has(live):
            raise Refused(
                f"{folder}: transformers computes {live} from several stored tensors, or it is not stored",
                "calibrated rounding does not know this architecture; round without calibration",
            )


class _Stop(Exception):
    """The last block was reached, or the model passes something else between blocks than hidden states."""


class _Handed(Tensor):  # type: ignore[misc]
    """Hidden states as a block gives them on: a model takes them as they are, or as the first of a tuple."""

    # What is computed from them is a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, int):
            return super().__getitem__(key)
        if key:
            raise _Stop
        return self

    def __iter__(self) -> Any:
        raise _Stop


class _Recorder(nn.Module):  # type: ignore[misc]
    """Stands in a block's place, keeps how it is called, and hands the hidden states on."""

    def __init__(self, block: Any, last: bool) -> None:
        super().__init__()
        self._block = [block]  # in a list, so that the block is no submodule
        self._last = last
        self.hidden: Tensor | None = None
        self.call = Call((), {})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)

    def forward(self, *positional: Any, **named: Any) -> Any:
        if not positional or not isinstance(positional[0], Tensor):
            raise _Stop
        self.hidden = positional[0]
        self.call = Call(positional[1:], named)
        if self._last:
            raise _Stop
        return self.hidden.as_subclass(_Handed)


def record(decoder: Decoder, tokens: Tensor) -> tuple[Tensor, list[Call]]:
    """The hidden states [batch, length, width] that the first block gets for tokens, and how every block is called.

    Raises Refused where a block gets something else than the one before gives; what the model raises is no answer.
    """
    recorders = _run_recorders(decoder, tokens)
    first = recorders[0].hidden
    # A recorder hands on what it got: what the next one gets is the same, or something lies between the blocks.
    if first is not None and all(item.hidden is not None and torch.equal(item.hidden, first) for item in recorders):
        return first, [_without_cache(item.call) for item in recorders]
    raise Refused(
        f"{type(decoder.model).__name__}: its decoder blocks do not follow one another",
        "calibrated rounding does not know this architecture; round without calibration",
    )


def _run_recorders(decoder: Decoder, tokens: Tensor) -> list[_Recorder]:
    blocks = decoder.blocks
    recorders = [_Recorder(block, number == len(blocks) - 1) for number, block in enumerate(blocks)]
    owner_name, _, last = decoder.place.rpartition(".")
    owner = decoder.model.get_submodule(owner_name)
    setattr(owner, last, nn.ModuleList(recorders))
    try:
        decoder.model(input_ids=tokens, use_cache=False)
    except _Stop:
        pass
    finally:
        setattr(owner, last, blocks)
    return recorders


def _without_cache(call: Call) -> Call:
    """A call that keeps nothing from one batch to the next."""
    named = {name: value for name, value in call.named.items() if not name.startswith("past_key_value")}
    return Call(call.positional, named)


def run(block: Any, hidden: Tensor, call: Call) -> Tensor:
    """The hidden states that a block makes."""
    found = block(hidden, *call.positional, **call.named)
    result: Tensor = found if isinstance(found, Tensor) else found[0]
    return result


def copy_of(block: Any) -> Any:
    """A block with values of its own."""
    return copy.deepcopy(block)
