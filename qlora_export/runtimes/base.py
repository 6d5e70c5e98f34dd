"""What a runtime is: it opens a finished folder as a consumer would; windows of tokens in, log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from qlora_export.types import Float32


class Session(Protocol):
    """A model opened in a runtime; that of a classifier has one row for a text, its log-probabilities of labels."""

    def log_probabilities(self, tokens: Sequence[int]) -> Float32:
        """Log-probabilities [tokens, vocabulary] of the token that follows each position, or [1, labels], in nats."""
        ...


@runtime_checkable
class BatchedSession(Session, Protocol):
    """A model that can run several windows at once."""

    def rows_at(self, windows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> list[Float32]:
        """Of each window the log-probabilities [places, vocabulary] of the token that follows each of these places.

        Raises MemoryError where so many windows do not fit.
        """
        ...


@runtime_checkable
class NarrowableSession(Session, Protocol):
    """A model that can also round as another dtype does."""

    def narrowed(self, dtype: str) -> Session:
        """The same model with linear layers whose inputs, weights and outputs are rounded to this dtype."""
        ...


@runtime_checkable
class GreedySession(Session, Protocol):
    """A model that goes on with a text."""

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text, as the model's own settings for generation say."""
        ...

    def greedy(self, tokens: Sequence[int], count: int, ends: Collection[int] = ()) -> list[int]:
        """The most likely next tokens, one after the other with a cache, up to and with the first one of `ends`."""
        ...


@dataclass(frozen=True)
class TracedLayer:
    """A layer of a live model, and its class; `block` is the decoder block that it is, or is part of."""

    name: str
    kind: str
    block: str | None = None


# Told a layer, its inputs [rows, columns] where they are floating-point, and its outputs [rows, width]; and what knows
# inputs to put in their place.
LayerCallback = Callable[[str, Float32 | None, Float32], None]


InputOverride = Callable[[str], Float32 | None]


@runtime_checkable
class TracedSession(Session, Protocol):
    """A model whose layers can be looked at."""

    def layers(self) -> tuple[TracedLayer, ...]:
        """The decoder blocks, and every innermost module with values of its own."""
        ...

    def trace(
        self,
        tokens: Sequence[int],
        names: Sequence[str],
        on_layer: LayerCallback,
        replaced_input: InputOverride | None = None,
    ) -> None:
        """Run a window and hand `on_layer` what these layers get and give; `replaced_input` may have other inputs."""
        ...


class Runtime(Protocol):
    """Opens a finished folder as a consumer would."""

    name: str

    def open(self, folder: Path, device: str = "cpu") -> AbstractContextManager[Session]:
        """Load the folder onto a device of torch, where the runtime knows such; raises InputError when it does not."""
        ...
