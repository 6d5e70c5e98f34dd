"""A live model of torch, layer by layer: which there are, what each gets and gives, on inputs of its own or on others'.

Layers are the decoder blocks, and the innermost modules with values of their own, an adapted one with its adapter as
one. Outside the blocks buffers count as values, so that the rotary embedding is a layer. Hooks do the work: the model
itself makes masks and positions, and a layer that is given other inputs hands its outputs on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import peft
import torch
from torch import Tensor

from qlora_export.runtimes.base import InputOverride, LayerCallback, TracedLayer
from qlora_export.sources.live_model import decoder_place


def traced_layers(model: Any) -> tuple[TracedLayer, ...]:
    """The layers of a model in the order of its modules, by the names that they have without an adapter."""
    live = _live(model)
    place = decoder_place(live)
    blocks = [] if place is None else [f"{place}.{name}" for name, _ in live.get_submodule(place).named_children()]
    found: list[TracedLayer] = []
    whole = None
    for name, module in live.named_modules():
        if whole is not None and name.startswith(f"{whole}."):
            continue
        block = next((one for one in blocks if f"{name}.".startswith(f"{one}.")), None)
        if name == block or _is_layer(module, block is not None):
            found.append(TracedLayer(name, _kind(module), block))
            whole = None if name == block else name
    return tuple(found)


def run_traced(
    model: Any,
    tokens: Sequence[int],
    names: Sequence[str],
    on_layer: LayerCallback,
    replaced_input: InputOverride | None,
) -> None:
    """Run a window and hand `on_layer` what each layer gets and gives; `replaced_input` may have other inputs."""
    live = _live(model)
    with _hooked([(name, live.get_submodule(name)) for name in names], on_layer, replaced_input), torch.no_grad():
        model(input_ids=torch.tensor([list(tokens)], device=model.device), use_cache=False)


def _live(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def _kind(module: Any) -> str:
    """The class, and what compressed-tensors says of its weights: what layers must share whose errors are alike."""
    weights = getattr(getattr(module, "quantization_scheme", None), "weights", None)
    stated = "" if weights is None else f" {weights.type}{weights.num_bits}"
    return f"{type(module).__name__}{stated}"


def _is_layer(module: Any, in_block: bool) -> bool:
    """Whether it computes with values of its own, and no module within it does."""
    if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer | peft.utils.other.AuxiliaryTrainingWrapper):
        return True
    own = _values(module, in_block, recurse=False)
    return own > 0 and own == _values(module, in_block, recurse=True)


def _values(module: Any, in_block: bool, recurse: bool) -> int:
    """How many tensors count as values of a module, with those within it or without."""
    parameters = sum(1 for _ in module.parameters(recurse))
    return parameters if in_block else parameters + sum(1 for _ in module.buffers(recurse))


@contextmanager
def _hooked(
    modules: Sequence[tuple[str, Any]], on_layer: LayerCallback, replaced_input: InputOverride | None
) -> Iterator[None]:
    handles = []
    try:
        for name, module in modules:
            before, after = _hooks(name, on_layer, replaced_input)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(
    name: str, on_layer: LayerCallback, replaced_input: InputOverride | None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What happens before and after a layer runs, which it may do several times."""
    seen: list[Tensor | None] = []

    def before(module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        key, inputs = _first(positional, named)
        seen.append(None if inputs is None else inputs.detach().clone())
        other = None if replaced_input is None or inputs is None else replaced_input(name)
        if key is None or inputs is None or other is None or other.size != inputs.numel():
            return None
        chosen = torch.from_numpy(other.copy()).to(inputs.device, inputs.dtype).reshape(inputs.shape)
        if isinstance(key, int):
            return (*positional[:key], chosen, *positional[key + 1 :]), named
        return positional, {**named, key: chosen}

    def after(module: Any, positional: tuple[Any, ...], named: dict[str, Any], outputs: Any) -> None:
        inputs, given = seen.pop(), _joined(outputs)
        if given is not None:
            on_layer(name, None if inputs is None else _rows(inputs), _rows(given))

    return before, after


def _first(positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[int | str | None, Tensor | None]:
    """Where the inputs are, and they themselves where they are floating-point."""
    everything: list[tuple[int | str, Any]] = [*enumerate(positional), *named.items()]
    for key, value in everything:
        if isinstance(value, Tensor):
            return key, value if value.is_floating_point() else None
    return None, None


def _joined(outputs: Any) -> Tensor | None:
    """What a layer gives as one tensor: of several that have the same rows, one beside the other; None without any."""
    given = outputs if isinstance(outputs, tuple | list) else (outputs,)
    found = [item for item in given if isinstance(item, Tensor) and item.is_floating_point() and item.ndim > 0]
    alike = [item for item in found if item.shape[:-1] == found[0].shape[:-1]]
    return torch.cat(alike, dim=-1) if alike else None


def _rows(values: Tensor) -> Any:
    """Float32 [rows, width] on the CPU."""
    return values.detach().reshape(-1, values.shape[-1]).float().cpu().numpy()
