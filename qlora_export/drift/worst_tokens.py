"""Where a candidate drifts most: single tokens with the text before them, and windows with their start.

What a mean of 0.01 nats hides is often a handful of tokens: a digit, a name, the end of an answer. The texts are those
that drift was measured on, so a report that leaves the machine is written without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qlora_export.drift.results import Measurement
from qlora_export.drift.tokens import TokenSet

SHOWN = 20
CONTEXT_TOKENS = 24
START_TOKENS = 24
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class WorstToken:
    """A token of the text, what stands before it, and what both models hold of it; probabilities from 0 to 1."""

    window: int
    position: int
    place: str
    before: str
    token: str
    kl: float
    p_reference: float
    p_candidate: float
    reference_says: str
    candidate_says: str


@dataclass(frozen=True)
class WorstWindow:
    """A window, its scored tokens, and how its text begins."""

    window: int
    place: str
    tokens: int
    mean_kl: float
    start: str


@dataclass(frozen=True)
class Worst:
    """Tokens and windows, the worst first; windows are numbered from 0."""

    tokens: tuple[WorstToken, ...]
    windows: tuple[WorstWindow, ...]


def worst_of(candidate: Measurement, reference: Measurement, tokens: TokenSet, decode: Decode) -> Worst:
    """The tokens and windows with the largest KL that is not zero; of labelled texts, each of which is a window, none.

    What is said there are names of labels.
    """
    counts = [len(window.scored) for window in tokens.windows]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    order = np.argsort(-candidate.kl, kind="stable")[:SHOWN]
    chosen = [int(number) for number in order if candidate.kl[number] > 0]
    found = [_token(number, candidate, reference, tokens, starts, decode) for number in chosen]
    if tokens.labels:
        return Worst(tuple(found), ())
    means = np.add.reduceat(candidate.kl, starts) / counts
    windows = [number for number in np.argsort(-means, kind="stable")[:SHOWN] if means[number] > 0]
    return Worst(tuple(found), tuple(_window(int(number), float(means[number]), tokens, decode) for number in windows))


def _token(
    number: int,
    candidate: Measurement,
    reference: Measurement,
    tokens: TokenSet,
    starts: np.ndarray[tuple[int], np.dtype[np.int64]],
    decode: Decode,
) -> WorstToken:
    at = int(np.searchsorted(starts, number, side="right")) - 1
    window = tokens.windows[at]
    position = window.scored[number - int(starts[at])]

    def name(scored: int) -> str:
        return tokens.labels[scored] if tokens.labels else decode([scored])

    return WorstToken(
        window=at,
        position=position,
        place=window.place,
        before=decode(window.tokens[max(0, position - CONTEXT_TOKENS) : position]),
        token=name(window.tokens[position]),
        kl=float(candidate.kl[number]),
        p_reference=float(np.exp(-reference.nll[number])),
        p_candidate=float(np.exp(-candidate.nll[number])),
        reference_says=name(int(reference.top1[number])),
        candidate_says=name(int(candidate.top1[number])),
    )


def _window(number: int, mean: float, tokens: TokenSet, decode: Decode) -> WorstWindow:
    window = tokens.windows[number]
    return WorstWindow(number, window.place, len(window.scored), mean, decode(window.tokens[:START_TOKENS]))
