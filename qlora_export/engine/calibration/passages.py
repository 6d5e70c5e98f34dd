"""Passages of a text, and the runs of words in them: what two texts have in common however they are laid out.

A passage is a paragraph of running text, or a message of a chat. A run is `RUN_WORDS` words in a row without their case
and punctuation, known by a number

    run(i) = sum_j word(i + j) * BASE^j   mod 2^64,   j = 0 .. RUN_WORDS - 1

with `word` the first 8 bytes of a word's BLAKE2b. Runs go across the paragraphs of running text, and stay in a message
of a chat. Cost: about a second for a million words.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlora_export.sources.text_entries import Chat, Entry

RUN_WORDS = 40
BASE = 0x9E3779B97F4A7C15
# A character of Chinese or Japanese is a word, since no space parts them.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
EMPTY_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Passage:
    """A paragraph or a message: its text, its words, the number of its entry and where that stands."""

    text: str
    words: tuple[str, ...]
    entry: int
    place: str


@dataclass(frozen=True)
class Runs:
    """The runs of a text: their numbers, and in which passage each begins."""

    numbers: NDArray[np.uint64]
    passages: NDArray[np.int64]


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text without case and punctuation."""
    return tuple(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def said(chat: Chat) -> Chat:
    """A chat without the system's messages, which many chats share."""
    return tuple(message for message in chat if message["role"] != "system")


def passages_of(entries: Sequence[Entry]) -> tuple[Passage, ...]:
    """The paragraphs or messages that have words, in order."""
    found = (
        Passage(text, words_of(text), number, place)
        for number, entry in enumerate(entries)
        for text, place in _pieces(entry)
    )
    return tuple(passage for passage in found if passage.words)


def runs_of(passages: Sequence[Passage], across: bool) -> Runs:
    """All runs of the passages; `across` their ends too, as in running text."""
    lengths = np.array([len(passage.words) for passage in passages], np.int64)
    owners = np.repeat(np.arange(len(passages)), lengths)
    known = {word: _number(word) for word in {word for passage in passages for word in passage.words}}
    numbers = np.array([known[word] for passage in passages for word in passage.words], np.uint64)
    count = max(0, len(numbers) - RUN_WORDS + 1)
    runs = np.zeros(count, np.uint64)
    for step in range(RUN_WORDS):
        runs += numbers[step : step + count] * np.uint64(pow(BASE, step, 1 << 64))
    starts = owners[:count]
    if across:
        return Runs(runs, starts)
    whole = starts == owners[RUN_WORDS - 1 :]
    return Runs(runs[whole], starts[whole])


def _pieces(entry: Entry) -> Iterator[tuple[str, str]]:
    """Texts of an entry and where they stand."""
    if not isinstance(entry.content, str):
        for message in said(entry.content):
            yield message["content"], entry.place
        return
    line, start = 1, 0
    for end, after in [*(found.span() for found in EMPTY_LINES.finditer(entry.content)), (len(entry.content), 0)]:
        text = entry.content[start:end]
        first_line = line + text.count("\n", 0, len(text) - len(text.lstrip()))
        yield text.strip(), f"line {first_line}" if entry.is_file else entry.place
        line += entry.content.count("\n", start, after)
        start = after


def _number(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest())
