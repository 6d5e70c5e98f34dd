"""The layer that broke: every layer of a candidate computes on the *reference's* inputs, so that errors do not add up.

The reference runs some windows once, and what its layers get and give is kept on the disk (`recording.py`). Then the
candidate runs them twice: decoder blocks on the inputs of the reference's blocks, and the layers within blocks on those
of the reference's layers. One model at a time is in memory.

A layer is broken where its error (`layer_difference.py`) is `TIMES_USUAL` the usual one and above `LEAST_ERROR`, or
where its gain is further from the usual one than `LEAST_GAIN`, and `TIMES_USUAL` further than others are. Usual is the
median over the same layer of the other blocks, or where there are fewer than `FEWEST_PEERS` over all layers of its
kind. A block that holds such a layer is not named itself. Of several the one furthest beyond its limit is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import numpy as np

from qlora_export.drift.layer_difference import Difference
from qlora_export.drift.recording import Recording
from qlora_export.drift.tokens import TokenSet
from qlora_export.runtimes.base import TracedLayer, TracedSession
from qlora_export.types import Float32

TRACED_TOKENS = 256
TIMES_USUAL = 4.0
LEAST_ERROR = 0.03
LEAST_GAIN = 0.03
FEWEST_PEERS = 3
# The error up to which a layer is not called broken that has no other of its kind beside it, as one in 4 bits may.
LONE_ERROR = 0.25
Windows = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class LayerError:
    """A layer and its error, relative to what the reference's layer adds."""

    name: str
    error: float


@dataclass(frozen=True)
class Broken:
    """The layer that stands out: its relative error, or how far its gain is off, and the `usual` one of others."""

    name: str
    error: float
    usual: float


@dataclass(frozen=True)
class Trace:
    """Embedding, positions, decoder blocks, final norm and head in the order that they ran; a `note` where none did."""

    layers: tuple[LayerError, ...]
    broken: Broken | None = None
    note: str = ""


@dataclass(frozen=True)
class TracedError:
    """A layer of the candidate, its error and its gain."""

    layer: TracedLayer
    error: float
    gain: float

    @property
    def is_block(self) -> bool:
        """Whether it is a decoder block."""
        return self.layer.name == self.layer.block

    @property
    def place(self) -> str | None:
        """Its name within its block; None outside."""
        return None if self.layer.block is None else self.layer.name.removeprefix(self.layer.block)


def traced_windows(tokens: TokenSet) -> list[tuple[int, ...]]:
    """The leading windows, cut after so many tokens in all."""
    found: list[tuple[int, ...]] = []
    left = TRACED_TOKENS
    for window in tokens.windows:
        if left > 1:
            found.append(window.read[:left])
            left -= len(found[-1])
    return found


def record(session: TracedSession, windows: Windows, recording: Recording) -> None:
    """Keep what every layer of the reference gets and gives."""
    names = [layer.name for layer in session.layers()]
    for number, window in enumerate(windows):
        session.trace(window, names, partial(recording.add, number))


def trace(session: TracedSession, windows: Windows, recording: Recording) -> Trace:
    """Run a candidate on what was recorded of the reference."""
    layers = session.layers()
    outer = _found(session, windows, recording, [layer for layer in layers if layer.block in (None, layer.name)])
    inner = _found(session, windows, recording, [layer for layer in layers if layer.block not in (None, layer.name)])
    return Trace(tuple(LayerError(item.layer.name, item.error) for item in outer), broken_among([*outer, *inner]))


def broken_among(found: Sequence[TracedError]) -> Broken | None:
    """The layer furthest beyond its limit, if any is."""
    suspects = [suspect for item in found for suspect in _suspicions(item, found)]
    held = {item.layer.block for _, item, _ in suspects if not item.is_block}
    chosen = [(excess, broken) for excess, item, broken in suspects if not (item.is_block and item.layer.block in held)]
    return max(chosen, key=lambda pair: pair[0])[1] if chosen else None


def _suspicions(item: TracedError, found: Sequence[TracedError]) -> Iterator[tuple[float, TracedError, Broken]]:
    """By error and by gain: how many times the limit it is, and what would be said of it."""
    peers = _peers(item, found)
    lone = not peers and item.layer.block is not None
    usual = median(peer.error for peer in peers) if peers else 0.0
    limit = max(LONE_ERROR if lone else LEAST_ERROR, TIMES_USUAL * usual)
    if item.error > limit:
        yield item.error / limit, item, Broken(item.layer.name, item.error, usual)
    # Outputs of a block are no linear function of its weights: rounding changes how much it adds.
    if item.is_block:
        return
    centre = median(peer.gain for peer in peers) if peers else 1.0
    spread = median(abs(peer.gain - centre) for peer in peers) if peers else 0.0
    off, limit = abs(item.gain - centre), max(LEAST_GAIN, TIMES_USUAL * spread)
    if off > limit:
        yield off / limit, item, Broken(item.layer.name, off, spread)


def _peers(item: TracedError, found: Sequence[TracedError]) -> list[TracedError]:
    """The same layer in other blocks, or where those are few all others of its kind."""
    alike = [other for other in found if other.layer.kind == item.layer.kind and other is not item]
    same = [other for other in alike if other.place is not None and other.place == item.place]
    return same if len(same) >= FEWEST_PEERS or item.is_block else alike


def _found(
    session: TracedSession, windows: Windows, recording: Recording, layers: Sequence[TracedLayer]
) -> list[TracedError]:
    """What these layers make of the reference's inputs, in the order that they run."""
    by_name = {layer.name: layer for layer in layers}
    differences: dict[str, Difference] = {}
    for number, window in enumerate(windows):
        run = _Run(recording, number, by_name, differences)
        session.trace(window, list(by_name), run.on_layer, run.replaced_input)
    return [TracedError(by_name[name], item.error, item.gain) for name, item in differences.items()]


@dataclass(frozen=True)
class _Run:
    """A candidate on one window; a layer is compared where the reference called its own as often, with as many rows."""

    recording: Recording
    window: int
    layers: Mapping[str, TracedLayer]
    differences: dict[str, Difference]
    calls: Counter[str] = field(default_factory=Counter)

    def replaced_input(self, name: str) -> Float32 | None:
        return self.recording.inputs(self.window, name, self.calls[name])

    def on_layer(self, name: str, inputs: Float32 | None, outputs: Float32) -> None:
        call = self.calls[name]
        self.calls[name] += 1
        reference = self.recording.outputs(self.window, name, call)
        if reference is None or reference.shape != outputs.shape:
            return
        given = self.recording.inputs(self.window, name, call) if self.layers[name].block == name else None
        carried = np.float32(0) if given is None else given
        self.differences.setdefault(name, Difference()).add(outputs - carried, reference - carried)
