"""The fixed, hashed set of tokens that every model of a ledger is measured on.

Chats: one window each, by the chat template, and only the assistant's tokens are scored. Running text: joined, cut into
disjoint windows that each begin with the begin token, all but that one scored. The protocol names these rules, since
numbers of different protocols do not compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from qlora_export.contracts import Tokenizer
from qlora_export.errors import InputError
from qlora_export.sources.text import DriftText
from qlora_export.sources.text_entries import Chat
from qlora_export.sources.windows import digest_of_tokens, text_windows


@dataclass(frozen=True)
class Window:
    """Token ids, and the positions whose token is scored, each at least 1."""

    tokens: tuple[int, ...]
    scored: tuple[int, ...]


@dataclass(frozen=True)
class TokenSet:
    """The windows of a ledger and the rules that made them."""

    windows: tuple[Window, ...]
    protocol: str

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
    return TokenSet(tuple(_until(at_least, iter(tokens.windows))), tokens.protocol)


def token_set(text: DriftText, tokenizer: Tokenizer, window_tokens: int, limit: int | None) -> TokenSet:
    """Windows of at most `window_tokens` until `limit` tokens are scored; raises InputError when none are."""
    found: Iterator[Window]
    if text.chats:
        found = (_chat_window(chat, tokenizer, window_tokens) for chat in text.chats)
        protocol = f"chat template, one window of at most {window_tokens} tokens a chat, assistant tokens scored"
    else:
        pieces = text_windows(tokenizer.encode(text.text), tokenizer.begin, window_tokens)
        found = (Window(tokens, tuple(range(1, len(tokens)))) for tokens in pieces)
        begin = "each after the begin token" if tokenizer.begin is not None else "no begin token"
        protocol = f"joined text, disjoint windows of {window_tokens} tokens, {begin}, all tokens scored"
    windows = tuple(_until(limit, (window for window in found if window.scored)))
    if not windows:
        raise InputError("the text for drift has no token to score", "give chats with assistant turns, or more text")
    return TokenSet(windows, protocol)


def _chat_window(chat: Chat, tokenizer: Tokenizer, window_tokens: int) -> Window:
    """A chat's tokens; each assistant turn is what its rendering adds to the rendering of the turns before."""
    tokens: list[int] = []
    scored: list[int] = []
    for number, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        if number == 0:
            raise InputError("a chat begins with the assistant", "give each chat the turn that the assistant answers")
        before = tokenizer.encode(tokenizer.render(chat[:number], answering=True))
        after = tokenizer.encode(tokenizer.render(chat[: number + 1], answering=False))
        if after[: len(before)] != before:
            raise InputError(
                "the chat template renders a turn differently once the next one follows",
                "assistant tokens cannot be told apart; give plain text for drift",
            )
        tokens = after
        scored += range(len(before), len(after))
    return Window(tuple(tokens[:window_tokens]), tuple(p for p in scored if 1 <= p < window_tokens))


def _until(limit: int | None, windows: Iterator[Window]) -> Iterator[Window]:
    total = 0
    for window in windows:
        if limit is not None and total >= limit:
            return
        total += len(window.scored)
        yield window
