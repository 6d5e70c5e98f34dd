"""Perplexity by word and by byte, which models with other tokenizers share, as lm-evaluation-harness defines them.

    word perplexity = exp(NLL / words)     byte perplexity = exp(NLL / bytes)     bits per byte = NLL / bytes / ln 2

with the NLL of all tokens of all documents. Words are what white space separates, an empty one before or after it
too; bytes are those of UTF-8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Documents:
    """Whole documents that were scored: how many, their words and their bytes."""

    count: int
    words: int
    bytes: int


@dataclass(frozen=True)
class DocumentPerplexity:
    """What a model measures by word and by byte."""

    word_perplexity: float
    byte_perplexity: float
    bits_per_byte: float


def documents_of(texts: Sequence[str]) -> Documents:
    """Count words and bytes of documents."""
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    return Documents(len(texts), words, sum(len(text.encode()) for text in texts))


def document_perplexity(mean_nll: float, tokens: int, documents: Documents) -> DocumentPerplexity:
    """From the mean NLL of the scored tokens, in nats; infinite where no float holds it, as for text without spaces."""
    total = mean_nll * tokens
    by_word, by_byte = total / documents.words, total / documents.bytes if documents.bytes else math.inf
    return DocumentPerplexity(_exponential(by_word), _exponential(by_byte), by_byte / math.log(2))


def _exponential(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
