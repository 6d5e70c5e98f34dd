"""The fixed, hashed set of tokens that every model of a ledger is measured on, and the rules that made it.

The protocol is part of every number: those of different protocols do not compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, chain, takewhile

from qlora_export.drift.documents import Documents
from qlora_export.sources.windows import digest_of_tokens


@dataclass(frozen=True)
class Window:
    """Token ids, and the positions whose token is scored, each at least 1.

    `place` says where in the text it stands, as in `line 3` or `tokens 0 to 1022`. Windows of one `block` depend on
    each other, as those of one document do: what resamples takes a block whole. Its numbers ascend, with gaps.
    """

    tokens: tuple[int, ...]
    scored: tuple[int, ...]
    place: str
    block: int

    @property
    def fed(self) -> tuple[int, ...]:
        """What a model reads of it: everything before the last scored token."""
        return self.tokens[: self.scored[-1]]


@dataclass(frozen=True)
class Protocol:
    """The rules that windows were made by: their name, and in a sentence what they are.

    `window_tokens` is the most that a window holds, `stride_tokens` how far the next one begins after it where that is
    a rule of its own, `begin` what becomes of the begin token, None where windows hold none.
    """

    name: str
    sentence: str
    window_tokens: int
    stride_tokens: int | None = None
    begin: str | None = None


@dataclass(frozen=True)
class TokenSet:
    """The windows of a ledger and the rules that made them; `documents` where these score whole ones."""

    windows: tuple[Window, ...]
    protocol: Protocol
    documents: Documents | None = None

    @property
    def count(self) -> int:
        """Number of scored tokens."""
        return sum(len(window.scored) for window in self.windows)

    @property
    def sha256(self) -> str:
        """Digest over the ids and scored positions of all windows, as little-endian int32 with lengths."""
        rows = chain.from_iterable((window.tokens, window.scored) for window in self.windows)
        return digest_of_tokens(rows)


def first_windows(tokens: TokenSet, at_least: int) -> TokenSet:
    """The leading windows that hold at least so many scored tokens, or all of them."""
    ends = accumulate(len(window.scored) for window in tokens.windows)
    count = sum(1 for _ in takewhile(lambda total: total < at_least, ends)) + 1
    return TokenSet(tokens.windows[:count], tokens.protocol)
