"""A session of a transformers model: windows in, log-probabilities out, in batches, greedily, or layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode

from qlora_export.runtimes.base import InputOverride, LayerCallback, TracedLayer
from qlora_export.runtimes.layer_trace import run_traced, traced_layers
from qlora_export.runtimes.loading import first_line
from qlora_export.types import Float32


class _Rounding(TorchFunctionMode):
    """Linear layers whose inputs, weights and outputs are rounded to a dtype, computed in float32.

    What differs from a server in that dtype is the order of its sums. A processor without units for bfloat16 would take
    some twenty times as long for the real thing.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.linear:
            return func(*args, **kwargs)
        rounded = [self._round(value) for value in args]
        return self._round(func(*rounded, **{name: self._round(value) for name, value in kwargs.items()}))

    def _round(self, value: Any) -> Any:
        return value.to(self._dtype).to(value.dtype) if isinstance(value, torch.Tensor) else value


def computing(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Within it linear layers round to this dtype, if one is stated."""
    return nullcontext() if dtype is None else _Rounding(dtype)


class TorchSession:
    """A loaded model of torch, whose layers can be looked at; with a `dtype`, linear layers round to that one."""

    def __init__(self, model: Any, dtype: torch.dtype | None = None) -> None:
        self._model = model
        self._dtype = dtype

    def narrowed(self, dtype: str) -> Self:
        """The same model with linear layers that round to this dtype."""
        return type(self)(self._model, getattr(torch, dtype))

    def layers(self) -> tuple[TracedLayer, ...]:
        """The decoder blocks, and every innermost module with values of its own."""
        return traced_layers(self._model)

    def trace(
        self,
        tokens: Sequence[int],
        names: Sequence[str],
        on_layer: LayerCallback,
        replaced_input: InputOverride | None = None,
    ) -> None:
        """Run a window and hand `on_layer` what these layers get and give; `replaced_input` may have other inputs."""
        with out_of_memory(), computing(self._dtype):
            run_traced(self._model, tokens, names, on_layer, replaced_input)


class ModelSession(TorchSession):
    """A loaded causal language model."""

    def log_probabilities(self, tokens: Sequence[int]) -> Float32:
        """Log-probabilities [tokens, vocabulary] of the token that follows each position, in nats."""
        return self.rows_at([tokens], [range(len(tokens))])[0]

    def rows_at(self, windows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> list[Float32]:
        """Of each window the log-probabilities [places, vocabulary] of the token that follows each of these places."""
        inputs = filled(windows, self._model.device)
        with torch.no_grad(), out_of_memory(), computing(self._dtype):
            logits = self._model(**inputs, use_cache=False).logits
            chosen = [logits[row, _index(at, logits.device)] for row, at in enumerate(places)]
            del logits
            return [torch.log_softmax(rows.float(), dim=-1).cpu().numpy() for rows in chosen]

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text, by the model's generation_config.json."""
        stated = getattr(self._model, "generation_config", None) or self._model.config
        ends = stated.eos_token_id
        return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def greedy(self, tokens: Sequence[int], count: int, ends: Collection[int] = ()) -> list[int]:
        """The most likely next tokens, one after the other with a cache, up to and with the first one of `ends`."""
        cache, found, inputs = None, list[int](), torch.tensor([list(tokens)], device=self._model.device)
        with torch.no_grad(), out_of_memory(), computing(self._dtype):
            while len(found) < count and not (found and found[-1] in ends):
                output = self._model(input_ids=inputs, past_key_values=cache, use_cache=True)
                cache, inputs = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
                found.append(int(inputs))
        return found


def _index(places: Sequence[int], device: torch.device) -> slice | torch.Tensor:
    """Places in a row; where they follow each other, without a copy of what stands there."""
    if len(places) and places[-1] - places[0] == len(places) - 1:
        return slice(places[0], places[-1] + 1)
    return torch.tensor(list(places), device=device)


def filled(windows: Sequence[Sequence[int]], device: torch.device, pad: int = 0) -> dict[str, torch.Tensor]:
    """Windows side by side, short ones filled up at their end, where no token looks."""
    longest = max(map(len, windows))
    tokens = torch.tensor([[*window, *[pad] * (longest - len(window))] for window in windows], device=device)
    if all(len(window) == longest for window in windows):
        return {"input_ids": tokens}
    lengths = torch.tensor([len(window) for window in windows], device=device)
    mask = torch.arange(longest, device=device)[None] < lengths[:, None]
    return {"input_ids": tokens, "attention_mask": mask.long()}


@contextmanager
def out_of_memory() -> Iterator[None]:
    """What torch says where memory is short becomes a MemoryError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(first_line(error)) from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise MemoryError(first_line(error)) from None
