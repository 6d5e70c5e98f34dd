"""How fast a model runs in its own runtime on this machine, as ratios to another that ran on the same windows.

Time is that of the windows that are measured anyway, so it costs nothing; the ratio is the median over windows of the
two times of one window, which leaves out how long windows are and most of what else the machine did. Greedy decoding is
timed by itself on short prompts. Neither says how fast a serving engine is: activations are float32 on a CPU, and
weights of bitsandbytes are decoded in every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Protocol, runtime_checkable

from qlora_export.contracts import Float32, Session
from qlora_export.drift.tokens import TokenSet

PROMPTS = 5
PROMPT_TOKENS = 16
DECODED_TOKENS = 16


@runtime_checkable
class GreedySession(Session, Protocol):
    """A model that goes on with a text."""

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The most likely next tokens, one after the other with a cache."""
        ...


@dataclass(frozen=True)
class Times:
    """Seconds for each window and its tokens, and for each decoded prompt."""

    tokens: tuple[int, ...]
    prefill: tuple[float, ...]
    decode: tuple[float, ...]


@dataclass(frozen=True)
class Speed:
    """Median tokens a second, and how many times as fast as the model that the others are compared with."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    prefill_ratio: float | None
    decode_ratio: float | None


@dataclass
class TimedSession:
    """A session that keeps the time of every window."""

    session: Session
    seconds: list[float] = field(default_factory=list)

    def log_probabilities(self, tokens: Sequence[int]) -> Float32:
        """As the session within answers."""
        before = perf_counter()
        found = self.session.log_probabilities(tokens)
        self.seconds.append(perf_counter() - before)
        return found


def timed(session: TimedSession, tokens: TokenSet) -> Times:
    """The times of the windows that were measured, and of decoding now, where the session can."""
    decode = []
    within = session.session
    if isinstance(within, GreedySession):
        for window in tokens.windows[:PROMPTS]:
            before = perf_counter()
            within.greedy(window.tokens[:PROMPT_TOKENS], DECODED_TOKENS)
            decode.append(perf_counter() - before)
    return Times(tuple(len(window.tokens) for window in tokens.windows), tuple(session.seconds), tuple(decode))


def speed_of(times: Times, base: Times | None) -> Speed:
    """Tokens a second, and the ratios to `base` where that was timed."""
    rates = [count / seconds for count, seconds in zip(times.tokens, times.prefill, strict=True)]
    return Speed(
        prefill_tokens_per_second=median(rates),
        decode_tokens_per_second=DECODED_TOKENS / median(times.decode) if times.decode else None,
        prefill_ratio=_ratio(times.prefill, base.prefill) if base else None,
        decode_ratio=_ratio(times.decode, base.decode) if base else None,
    )


def _ratio(seconds: Sequence[float], base: Sequence[float]) -> float | None:
    ratios = [other / own for own, other in zip(seconds, base, strict=False)]
    return median(ratios) if ratios else None
