"""The windows of tokens that calibration looks at, drawn from one text or from a mixture of several.

A chat is one window: the whole conversation by the model's chat template, cut at `window_tokens`. Running text is cut
into disjoint windows that each begin with the begin token. Of each text its share of the windows is drawn, in the order
of sha256("SEED:INDEX:WINDOW"): the same on every machine and under every version of a library, and a larger number of
sequences holds the smaller one's. Chats are encoded when they are drawn; running text is encoded whole.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_export.errors import InputError
from qlora_export.recipe.calibration import CalibrationRecipe
from qlora_export.sources.text import joined, read_entries
from qlora_export.sources.text_entries import Entry
from qlora_export.sources.tokenizer import Tokenizer
from qlora_export.sources.windows import digest_of_tokens, text_windows

# Fewer sequences describe their own noise as much as the activations of the model.
FEW_SEQUENCES = 64


@dataclass(frozen=True)
class CalibrationText:
    """One text of the mixture, read: its name in the recipe, its share, and what stands in it."""

    name: str
    share: float
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class CalibrationPart:
    """What was taken from one text: windows drawn out of those available, and their tokens."""

    name: str
    windows: int
    tokens: int
    available: int


@dataclass(frozen=True)
class CalibrationTokens:
    """The windows, token ids each, in the order of the texts; `notes` say what should not stay silent."""

    windows: tuple[tuple[int, ...], ...]
    parts: tuple[CalibrationPart, ...]
    notes: tuple[str, ...]

    @property
    def sequences(self) -> int:
        """Number of windows."""
        return len(self.windows)

    @property
    def tokens(self) -> int:
        """Number of tokens in all windows."""
        return sum(len(window) for window in self.windows)

    @property
    def sha256(self) -> str:
        """Digest over the ids of all windows, as little-endian int32 with lengths."""
        return digest_of_tokens(self.windows)


def read_calibration(recipe: CalibrationRecipe, folder: Path) -> tuple[CalibrationText, ...]:
    """Read the texts, relative paths seen from `folder`; raises InputError naming file and line."""
    return tuple(CalibrationText(part.text, part.share, read_entries(part.text, folder)) for part in recipe.parts)


def calibration_tokens(
    recipe: CalibrationRecipe, texts: Sequence[CalibrationText], tokenizer: Tokenizer
) -> CalibrationTokens:
    """Draw the windows; where a text has too few, all of them. Raises InputError for a text without any."""
    windows: list[tuple[int, ...]] = []
    parts, notes = [], []
    counts = sequence_counts([text.share for text in texts], recipe.sequences)
    for index, (text, count) in enumerate(zip(texts, counts, strict=True)):
        drawn, available = _draw(text, index, count, recipe, tokenizer)
        windows += drawn
        parts.append(CalibrationPart(text.name, len(drawn), sum(map(len, drawn)), available))
        if available < count:
            notes.append(f"calibration: {text.name} has {available} of the {count} sequences asked for: all are taken")
    if len(windows) < FEW_SEQUENCES:
        notes.append(f"calibration: {len(windows)} sequences are few; give {FEW_SEQUENCES} or more, 128 are usual")
    return CalibrationTokens(tuple(windows), tuple(parts), tuple(notes))


def sequence_counts(shares: Sequence[float], sequences: int) -> list[int]:
    """Whole numbers that come to `sequences`, each within one of its share; what is left goes to the largest rests."""
    exact = [share / math.fsum(shares) * sequences for share in shares]
    counts = [math.floor(number) for number in exact]
    by_rest = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_rest[: sequences - sum(counts)]:
        counts[index] += 1
    return counts


def _draw(
    text: CalibrationText, index: int, count: int, recipe: CalibrationRecipe, tokenizer: Tokenizer
) -> tuple[list[tuple[int, ...]], int]:
    """The drawn windows of one text, and how many it has."""
    content = joined(text.entries)
    if content.chats:
        available = len(content.chats)
        chosen = [content.chats[number] for number in _order(recipe.seed, index, available)[:count]]
        rendered = (tokenizer.encode(tokenizer.render(chat, answering=False)) for chat in chosen)
        drawn = [tuple(ids[: recipe.window_tokens]) for ids in rendered]
    else:
        windows = list(text_windows(tokenizer.encode(content.text), tokenizer.begin, recipe.window_tokens))
        available = len(windows)
        drawn = [windows[number] for number in _order(recipe.seed, index, available)[:count]]
    if available == 0 or not all(drawn):
        raise InputError(
            f"{text.name}: {'a conversation' if available else 'the text'} for calibration has no token",
            "give chats, or running text",
        )
    return drawn, available


def _order(seed: int, index: int, count: int) -> list[int]:
    """A permutation of the windows 0 to `count` of one text of the mixture."""
    return sorted(range(count), key=lambda window: hashlib.sha256(f"{seed}:{index}:{window}".encode()).digest())
