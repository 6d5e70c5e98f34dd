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
    """Token ids, and the positions whose token is scored, each at least 1.

    `place` says where in the text it stands, as in `line 3` or `tokens 0 to 1022`. Windows of one `block` depend on
    each other, as those of one document do: what resamples takes a block whole. Its numbers ascend, with gaps.
    """

    tokens: tuple[int, ...]
    scored: tuple[int, ...]
    place: str
    block: int


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
    """The windows of a ledger and the rules that made them."""

    windows: tuple[Window, ...]
    protocol: Protocol

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
        found = (_chat_window(chat, number, tokenizer, window_tokens) for number, chat in enumerate(text.chats))
        sentence = f"chat template, one window of at most {window_tokens} tokens a chat, assistant tokens scored"
        protocol = Protocol("windows", sentence, window_tokens, begin="as the chat template has it")
    else:
        found = _running_windows(text.text, tokenizer, window_tokens)
        begin = "each after the begin token" if tokenizer.begin is not None else None
        sentence = f"joined text, disjoint windows of {window_tokens} tokens, {begin or 'no begin token'}"
        protocol = Protocol("windows", f"{sentence}, all tokens scored", window_tokens, begin=begin)
    windows = tuple(_until(limit, (window for window in found if window.scored)))
    if not windows:
        raise InputError("the text for drift has no token to score", "give chats with assistant turns, or more text")
    return TokenSet(windows, protocol)


def _running_windows(text: str, tokenizer: Tokenizer, window_tokens: int) -> Iterator[Window]:
    """Windows over a whole text; all of its tokens are scored, the begin token is not one of them."""
    first = 0
    for block, tokens in enumerate(text_windows(tokenizer.encode(text), tokenizer.begin, window_tokens)):
        own = len(tokens) - (tokenizer.begin is not None)
        yield Window(tokens, tuple(range(1, len(tokens))), f"tokens {first} to {first + own - 1}", block)
        first += own


def _chat_window(chat: Chat, number: int, tokenizer: Tokenizer, window_tokens: int) -> Window:
    """A chat's tokens; each assistant turn is what its rendering adds to the rendering of the turns before."""
    tokens: list[int] = []
    scored: list[int] = []
    for turn, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise InputError("a chat begins with the assistant", "give each chat the turn that the assistant answers")
        before = tokenizer.encode(tokenizer.render(chat[:turn], answering=True))
        after = tokenizer.encode(tokenizer.render(chat[: turn + 1], answering=False))
        if after[: len(before)] != before:
            raise InputError(
                "the chat template renders a turn differently once the next one follows",
                "assistant tokens cannot be told apart; give plain text for drift",
            )
        tokens = after
        scored += range(len(before), len(after))
    scored = [position for position in scored if 1 <= position < window_tokens]
    return Window(tuple(tokens[:window_tokens]), tuple(scored), f"chat {number + 1}", number)


def _until(limit: int | None, windows: Iterator[Window]) -> Iterator[Window]:
    total = 0
    for window in windows:
        if limit is not None and total >= limit:
            return
        total += len(window.scored)
        yield window
