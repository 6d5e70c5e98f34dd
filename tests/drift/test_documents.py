from __future__ import annotations

import math

import pytest

from qlora_export.drift.documents import document_perplexity, documents_of


def test_words_and_bytes() -> None:
    found = documents_of(["two words", " ä\n", ""])
    assert (found.count, found.words, found.bytes) == (3, 2 + 3 + 1, 9 + 4)


def test_by_word_and_by_byte() -> None:
    found = document_perplexity(0.5, 40, documents_of(["ab cd"]))
    assert found.word_perplexity == pytest.approx(math.exp(20 / 2))
    assert found.byte_perplexity == pytest.approx(math.exp(20 / 5))
    assert found.bits_per_byte == pytest.approx(20 / 5 / math.log(2))


def test_what_no_float_holds() -> None:
    assert document_perplexity(5.0, 1000, documents_of(["\u6f22" * 1000])).word_perplexity == math.inf
    assert document_perplexity(5.0, 1, documents_of([""])).byte_perplexity == math.inf
