"""How fast a model runs in its own runtime on this machine, and as a ratio to another that ran in the same comparison.

    prefill   the longest of the windows that were measured, whole
    decode    tokens one after the other with a cache, most likely first, after a short prompt

Each is repeated, and the least time counts: whatever else a machine does only adds to it, and a median would move with
it from one row to the next. Neither number says how fast a serving engine is: activations are float32 on a CPU, and
weights of bitsandbytes are decoded in every call. Cost: a few windows for each model, and a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from qlora_export.drift.tokens import TokenSet
from qlora_export.runtimes.base import GreedySession, Session

REPEATS = 5
# A small model is repeated for as long: its runs are short enough to fall between what else the machine does.
LEAST_SECONDS = 0.5
PROMPT_TOKENS = 16
DECODED_TOKENS = 16


@dataclass(frozen=True)
class Speed:
    """Tokens a second; None for decoding where the session cannot."""

    prefill: float
    decode: float | None


def speed_of(session: Session, tokens: TokenSet) -> Speed:
    """Time a session that has answered before."""
    window = max((window.read for window in tokens.windows), key=len)
    prefill = len(window) / _least(lambda: session.log_probabilities(window))
    if not isinstance(session, GreedySession):
        return Speed(prefill, None)
    prompt = window[:PROMPT_TOKENS]
    return Speed(prefill, DECODED_TOKENS / _least(lambda: session.greedy(prompt, DECODED_TOKENS)))


def _least(run: Callable[[], object]) -> float:
    """The least of the seconds that it takes."""
    seconds: list[float] = []
    while len(seconds) < REPEATS or sum(seconds) < LEAST_SECONDS:
        before = perf_counter()
        run()
        seconds.append(perf_counter() - before)
    return min(seconds)
