"""The token set of a text by a named protocol. Which tokens each scores is in `running_text.py` and `chats.py`.

`docs/drift.md` says which tool's numbers each is made to agree with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from qlora_export.drift.chats import chat_windows
from qlora_export.drift.classification import labelled_tokens
from qlora_export.drift.documents import documents_of
from qlora_export.drift.running_text import (
    disjoint_windows,
    half_scored_chunks,
    rolling_windows,
    running_windows,
    strided_windows,
)
from qlora_export.drift.tokens import Protocol, TokenSet, Window
from qlora_export.drift.window_sizes import SizedProtocol
from qlora_export.errors import InputError, UsageError
from qlora_export.recipe.protocols import FEWEST_TOKENS, LABELS, Kind, protocol_of_name
from qlora_export.sources.text import DriftText
from qlora_export.sources.text_entries import Entry
from qlora_export.sources.tokenizer import Tokenizer

RENDERED_ANEW = ", a further one where the template renders earlier turns anew"


def token_set(text: DriftText, tokenizer: Tokenizer, protocol: SizedProtocol, limit: int | None) -> TokenSet:
    """The windows of a protocol, whole blocks of them, until `limit` tokens are scored.

    Raises UsageError where the protocol is not for such a text, InputError where it has no token to score.
    """
    if not any(entry.content for entry in text.entries):
        raise InputError("the text for drift is empty", "name a file with chats, or with running text")
    require_kind(text, protocol.name)
    if protocol.labels:
        return labelled_tokens(text, tokenizer, protocol, limit)
    if text.chats:
        return _of_chats(text, tokenizer, protocol, limit)
    if protocol.kind == "lm-eval-rolling":
        return _of_documents(text.entries, tokenizer, protocol, limit)
    return _of_running_text(text.text, tokenizer, protocol, limit)


def require_kind(text: DriftText, name: str) -> None:
    """Raise UsageError for chats by a protocol that is defined for running text."""
    if name == LABELS:
        return
    if text.chats and protocol_of_name(name)[0] != "windows":
        raise UsageError(
            f"protocol {name} is for running text, and the text for drift is {len(text.chats)} chats: the "
            "tool that it agrees with knows neither a chat template nor which tokens the assistant wrote",
            "take protocol windows, or give running text: a .txt file, or lines with `text`",
        )


def _of_chats(text: DriftText, tokenizer: Tokenizer, protocol: SizedProtocol, limit: int | None) -> TokenSet:
    size = protocol.window_tokens
    found = (chat_windows(entry, block, tokenizer, size) for block, entry in enumerate(text.entries))
    windows = _scored(chain.from_iterable(found), limit)
    if not windows:
        raise InputError(
            "the chats for drift have no token to score", "give chats with assistant turns, or longer windows"
        )
    again = RENDERED_ANEW if len({window.block for window in windows}) < len(windows) else ""
    sentence = f"chat template, one window of at most {size} tokens a chat{again}, assistant tokens scored"
    return TokenSet(windows, Protocol(protocol.name, sentence, size, begin="as the chat template has it"))


def _of_documents(
    entries: Sequence[Entry], tokenizer: Tokenizer, protocol: SizedProtocol, limit: int | None
) -> TokenSet:
    prefix = tokenizer.begin if tokenizer.begin is not None else tokenizer.end
    if prefix is None:
        raise InputError(
            f"protocol {protocol.name}: the tokenizer has neither a begin nor an end token to put before a document",
            "take another protocol, such as strided",
        )
    size = protocol.window_tokens
    found = (
        rolling_windows(_as_harness_encodes(entry.text, prefix, tokenizer), prefix, size, block, entry.place)
        for block, entry in enumerate(entries)
    )
    windows = _scored(chain.from_iterable(found), limit)
    if not windows:
        raise InputError("the text for drift has no token to score", "give more text")
    last = len(entries) if limit is None or _count(windows) < limit else windows[-1].block + 1
    begin = f"the {'end' if tokenizer.begin is None else 'begin'} token before each document"
    if _adds_begin(tokenizer):
        begin += ", and the one that the tokenizer adds, scored"
    sentence = f"every document for itself, windows of {size} tokens, {begin}, all tokens scored"
    documents = documents_of([entry.text for entry in entries[:last]])
    return TokenSet(windows, Protocol(protocol.name, sentence, size, begin=begin), documents)


def _as_harness_encodes(text: str, prefix: int, tokenizer: Tokenizer) -> list[int]:
    """With the special tokens of the tokenizer's own, but for a text that begins with the prefix already."""
    ids = tokenizer.encode(text)
    return ids if ids[:1] == [prefix] else tokenizer.encode_whole(text)


def _of_running_text(text: str, tokenizer: Tokenizer, protocol: SizedProtocol, limit: int | None) -> TokenSet:
    made = MAKERS[protocol.kind](text, tokenizer, protocol)
    windows = _scored(made.windows, limit)
    if not windows:
        raise _too_short(text, tokenizer, protocol)
    size, stride = protocol.window_tokens, protocol.stride_tokens
    sentence = f"joined text, {made.cut}, {made.begin or 'no begin token'}, {made.scored}"
    return TokenSet(windows, Protocol(protocol.name, sentence, size, stride, made.begin))


@dataclass(frozen=True)
class _Made:
    """Windows over running text, and in words how it was cut, what became of the begin token, what is scored."""

    windows: Iterator[Window]
    cut: str
    begin: str | None
    scored: str


def _usual(text: str, tokenizer: Tokenizer, protocol: SizedProtocol) -> _Made:
    size, begin = protocol.window_tokens, tokenizer.begin
    windows = running_windows(tokenizer.encode(text), begin, size)
    rule = None if begin is None else "each after the begin token"
    return _Made(windows, f"disjoint windows of {size} tokens", rule, "all tokens scored")


def _disjoint(text: str, tokenizer: Tokenizer, protocol: SizedProtocol) -> _Made:
    size = protocol.window_tokens
    windows = disjoint_windows(tokenizer.encode_whole(text), size)
    cut = f"disjoint windows of {size} tokens without a rest"
    return _Made(windows, cut, _at_the_start(tokenizer), "all but the first of each scored")


def _half_scored(text: str, tokenizer: Tokenizer, protocol: SizedProtocol) -> _Made:
    size = protocol.window_tokens
    begin = tokenizer.begin if _adds_begin(tokenizer) else None
    windows = half_scored_chunks(tokenizer.encode_whole(text), begin, size)
    rule = None if begin is None else "the begin token in place of the first of each"
    cut = f"disjoint windows of {size} tokens without a rest"
    return _Made(windows, cut, rule, f"the last {size - size // 2 - 1} of each scored")


def _strided(text: str, tokenizer: Tokenizer, protocol: SizedProtocol) -> _Made:
    size, stride = protocol.window_tokens, protocol.stride_tokens or protocol.window_tokens
    windows = strided_windows(tokenizer.encode_whole(text), size, stride)
    cut = f"windows of {size} tokens every {stride}"
    return _Made(windows, cut, _at_the_start(tokenizer), "scored where the window before did not reach")


MAKERS: Mapping[Kind, Callable[[str, Tokenizer, SizedProtocol], _Made]] = {
    "windows": _usual,
    "disjoint": _disjoint,
    "llama.cpp": _half_scored,
    "strided": _strided,
}


def _at_the_start(tokenizer: Tokenizer) -> str | None:
    return "the begin token at the very start" if _adds_begin(tokenizer) else None


def _too_short(text: str, tokenizer: Tokenizer, protocol: SizedProtocol) -> InputError:
    ids = len(tokenizer.encode_whole(text))
    if protocol.kind in ("disjoint", "llama.cpp") and ids:
        return InputError(
            f"protocol {protocol.name} scores whole windows of {protocol.window_tokens} tokens, and the text for drift "
            f"has {ids}",
            f"give more text, or take a smaller window, as in {protocol.kind}-{max(FEWEST_TOKENS, ids // 2)}",
        )
    return InputError("the text for drift has no token to score", "give more text")


def _adds_begin(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer itself puts the begin token before a text."""
    return tokenizer.begin is not None and tokenizer.encode_whole("")[:1] == [tokenizer.begin]


def _scored(windows: Iterable[Window], limit: int | None) -> tuple[Window, ...]:
    """Windows with a scored token, whole blocks until `limit` tokens are."""
    return tuple(_until(limit, (window for window in windows if window.scored)))


def _until(limit: int | None, windows: Iterator[Window]) -> Iterator[Window]:
    total, last = 0, -1
    for window in windows:
        if limit is not None and total >= limit and window.block != last:
            return
        total, last = total + len(window.scored), window.block
        yield window


def _count(windows: Sequence[Window]) -> int:
    return sum(len(window.scored) for window in windows)
