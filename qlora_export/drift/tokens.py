"""The fixed, hashed set of tokens that every model of a ledger is measured on, and the rules that made it.

The protocol is part of every number: those of different protocols do not compare.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, chain, takewhile
from typing import Literal

from qlora_export.drift.documents import Documents
from qlora_export.sources.windows import digest_of_tokens

Unit = Literal["tokens", "labels"]


@dataclass(frozen=True)
class Window:
    """Token ids, and the positions whose token is scored, each at least 1.

    `place` says where in the text it stands, as in `line 3` or `tokens 0 to 1022`. Windows of one `block` depend on
    each other, as those of one document do: what resamples takes a block whole. Its numbers ascend, with gaps. A
    `labelled` one ends with the number of its text's label, which is scored and no token.
    """

    tokens: tuple[int, ...]
    scored: tuple[int, ...]
    place: str
    block: int
    labelled: bool = False

    @property
    def fed(self) -> tuple[int, ...]:
        """What a model reads of it: everything before the last scored token."""
        return self.tokens[: self.scored[-1]]

    @property
    def read(self) -> tuple[int, ...]:
        """Its tokens, all of them; the number of a label is none."""
        return self.fed if self.labelled else self.tokens

    @property
    def rows(self) -> tuple[int, ...]:
        """Which rows of a model speak of what is scored: row t - 1 of token t, and of a label the only one."""
        return (0,) if self.labelled else tuple(place - 1 for place in self.scored)


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
    """The windows of a ledger and the rules that made them; `documents` where these score whole ones.

    `labels` are the names of the labels by number where a classifier is measured.
    """

    windows: tuple[Window, ...]
    protocol: Protocol
    documents: Documents | None = None
    labels: tuple[str, ...] = ()

    @property
    def unit(self) -> Unit:
        """What is scored, in a word."""
        return "labels" if self.labels else "tokens"

    @property
    def highest_token(self) -> int:
        """The highest id among all tokens."""
        return max(max(window.read) for window in self.windows)

    @property
    def count(self) -> int:
        """Number of scored tokens, or of labels."""
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
    return replace(tokens, windows=tokens.windows[:count], documents=None)
