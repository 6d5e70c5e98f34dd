from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_export.drift.tokens import token_set
from qlora_export.errors import InputError
from qlora_export.runtimes.loading import FolderTokenizer
from qlora_export.sources.text import DriftText
from tests.conftest import DEMO, DIALOGUE, TOKENIZER_FILES


class Letters:
    """One token a letter; 0 begins a text."""

    begin: int | None = 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def render(self, messages: Sequence[Mapping[str, str]], answering: bool) -> str:
        return "".join(f"<{m['role'][0]}>{m['content']}." for m in messages) + ("<a>" if answering else "")


@given(text=st.text("abc", min_size=1, max_size=60), window=st.integers(2, 20))
def test_every_token_of_a_text_is_scored_once(text: str, window: int) -> None:
    tokens = token_set(DriftText(text=text), Letters(), window, None)
    scored = [piece.tokens[position] for piece in tokens.windows for position in piece.scored]
    assert scored == [ord(letter) for letter in text]
    assert all(piece.tokens[0] == 0 and len(piece.tokens) <= window for piece in tokens.windows)
    assert tokens.count == len(text)


def chat(*contents: str) -> tuple[Mapping[str, str], ...]:
    roles = ("user", "assistant")
    return tuple({"role": roles[number % 2], "content": text} for number, text in enumerate(contents))


def test_only_the_assistants_tokens_are_scored() -> None:
    (window,) = token_set(DriftText(chats=(chat("hi", "yo", "ok", "bye"),)), Letters(), 100, None).windows
    assert "".join(map(chr, window.tokens)) == "<u>hi.<a>yo.<u>ok.<a>bye."
    assert "".join(chr(window.tokens[position]) for position in window.scored) == "yo.bye."


def test_a_long_chat_is_cut() -> None:
    (window,) = token_set(DriftText(chats=(chat("hi", "y" * 50),)), Letters(), 20, None).windows
    assert len(window.tokens) == 20
    assert window.scored == tuple(range(9, 20))


def test_the_limit_ends_after_a_whole_window() -> None:
    tokens = token_set(DriftText(text="a" * 100), Letters(), 11, 15)
    assert tokens.count == 20


def test_the_hash_is_of_tokens_and_scoring() -> None:
    one = token_set(DriftText(text="abcd"), Letters(), 5, None)
    assert one.sha256 == token_set(DriftText(text="abcd"), Letters(), 50, None).sha256
    assert one.sha256 != token_set(DriftText(text="abce"), Letters(), 5, None).sha256
    assert one.sha256 != token_set(DriftText(text="abcd"), Letters(), 4, None).sha256
    assert "windows of 5 tokens" in one.protocol.sentence
    # Reports of earlier releases hold such numbers.
    kept = "9fe24df76217d7759819c4078e97c07f5d409b00c336fefaf09e9dbb86fd58b6"
    assert token_set(DriftText(text="abcdefghij" * 9), Letters(), 7, None).sha256 == kept


def test_nothing_to_score() -> None:
    with pytest.raises(InputError, match="no token to score"):
        token_set(DriftText(chats=(chat("only a question"),)), Letters(), 100, None)
    with pytest.raises(InputError, match="no token to score"):
        token_set(DriftText(text=""), Letters(), 100, None)


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    class Forgetful(Letters):
        def render(self, messages: Sequence[Mapping[str, str]], answering: bool) -> str:
            return f"{len(messages)}{super().render(messages, answering)}"

    with pytest.raises(InputError, match="renders a turn differently"):
        token_set(DriftText(chats=(chat("hi", "yo"),)), Forgetful(), 100, None)


def test_a_chat_that_the_template_refuses(tmp_path: Path) -> None:
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / "base" / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="the chat template refuses a chat: roles must alternate"):
        FolderTokenizer(tmp_path).render(DIALOGUE, answering=False)


def test_a_chat_that_begins_with_the_assistant() -> None:
    with pytest.raises(InputError, match="begins with the assistant"):
        token_set(DriftText(chats=(({"role": "assistant", "content": "x"},),)), Letters(), 100, None)


def test_the_demos_tokenizer() -> None:
    tokenizer = FolderTokenizer(DEMO / "base")
    (window,) = token_set(DriftText(chats=(tuple(DIALOGUE),)), tokenizer, 512, None).windows
    assert window.tokens[0] == tokenizer.begin
    text = tokenizer.encode(DIALOGUE[1]["content"])
    assert [window.tokens[position] for position in window.scored][: len(text)] == text
