from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_export.drift.protocols import token_set
from qlora_export.drift.tokens import TokenSet, first_windows
from qlora_export.drift.window_sizes import SizedProtocol
from qlora_export.errors import InputError
from qlora_export.runtimes.tokenizer import FolderTokenizer
from qlora_export.sources.text import DriftText
from qlora_export.sources.text_entries import Chat, Entry
from tests.helpers.pico import DEMO, DIALOGUE, TOKENIZER_FILES


class Letters:
    """One token a letter; 0 begins a text and 1 ends it. The tokenizer itself puts `added` before a text."""

    begin: int | None = 0
    end: int | None = 1
    added: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def encode_whole(self, text: str) -> list[int]:
        return [*self.added, *self.encode(text)]

    def encode_within(self, text: str, pair: str | None, limit: int) -> tuple[list[int], bool]:
        ids = self.encode_whole(text + (pair or ""))
        return ids[:limit], len(ids) <= limit

    def render(self, messages: Sequence[Mapping[str, str]], answering: bool) -> str:
        return "".join(f"<{m['role'][0]}>{m['content']}." for m in messages) + ("<a>" if answering else "")


def running(*pieces: str) -> DriftText:
    return DriftText(tuple(Entry(piece, f"line {number}") for number, piece in enumerate(pieces, 1)))


def chats(*given: Chat) -> DriftText:
    return DriftText(tuple(Entry(chat, f"line {number}") for number, chat in enumerate(given, 1)))


def usual(text: DriftText, window: int = 100, limit: int | None = None, tokenizer: Letters | None = None) -> TokenSet:
    return token_set(text, tokenizer or Letters(), SizedProtocol("windows", "windows", window), limit)


@given(text=st.text("abc", min_size=1, max_size=60), window=st.integers(2, 20))
def test_every_token_of_a_text_is_scored_once(text: str, window: int) -> None:
    tokens = usual(running(text), window)
    scored = [piece.tokens[position] for piece in tokens.windows for position in piece.scored]
    assert scored == [ord(letter) for letter in text]
    assert all(piece.tokens[0] == 0 and len(piece.tokens) <= window for piece in tokens.windows)
    assert tokens.count == len(text)


def chat(*contents: str) -> tuple[Mapping[str, str], ...]:
    roles = ("user", "assistant")
    return tuple({"role": roles[number % 2], "content": text} for number, text in enumerate(contents))


def test_only_the_assistants_tokens_are_scored() -> None:
    (window,) = usual(chats(chat("hi", "yo", "ok", "bye"))).windows
    assert "".join(map(chr, window.tokens)) == "<u>hi.<a>yo.<u>ok.<a>bye."
    assert "".join(chr(window.tokens[position]) for position in window.scored) == "yo.bye."


def test_a_long_chat_is_cut() -> None:
    (window,) = usual(chats(chat("hi", "y" * 50)), 20).windows
    assert len(window.tokens) == 20
    assert window.scored == tuple(range(9, 20))


def test_the_limit_ends_after_a_whole_window() -> None:
    tokens = usual(running("a" * 100), 11, 15)
    assert tokens.count == 20


def test_the_hash_is_of_tokens_and_scoring() -> None:
    one = usual(running("abcd"), 5)
    assert one.sha256 == usual(running("abcd"), 50).sha256
    assert one.sha256 != usual(running("abce"), 5).sha256
    assert one.sha256 != usual(running("abcd"), 4).sha256
    assert "windows of 5 tokens" in one.protocol.sentence
    # Reports of earlier releases hold such numbers.
    kept = "9fe24df76217d7759819c4078e97c07f5d409b00c336fefaf09e9dbb86fd58b6"
    assert usual(running("abcdefghij" * 9), 7).sha256 == kept


def test_nothing_to_score() -> None:
    with pytest.raises(InputError, match="no token to score"):
        usual(chats(chat("only a question")))
    with pytest.raises(InputError, match="the text for drift is empty"):
        usual(running(""))


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    class Forgetful(Letters):
        def render(self, messages: Sequence[Mapping[str, str]], answering: bool) -> str:
            return f"{len(messages)}{super().render(messages, answering)}"

    with pytest.raises(InputError, match="line 1: the chat template renders a turn differently"):
        usual(chats(chat("hi", "yo")), tokenizer=Forgetful())


def test_a_template_that_renders_the_past_anew_gives_a_window_an_answer() -> None:
    class Reasoning(Letters):
        """Shows what was thought in the last answer only, as templates of reasoning models do."""

        def render(self, messages: Sequence[Mapping[str, str]], answering: bool) -> str:
            asked = [message["role"] for message in messages].count("user")
            last = messages[-1]["role"] == "assistant" and not answering
            thought = super().render(messages[:-1], False) + f"<a>({asked}){messages[-1]['content']}." if last else ""
            return thought or super().render(messages, answering)

    found = usual(chats(chat("hi", "yo", "ok", "bye"), chat("so", "la")), tokenizer=Reasoning())
    shown = ["".join(map(chr, window.tokens)) for window in found.windows]
    assert shown == ["<u>hi.<a>(1)yo.", "<u>hi.<a>yo.<u>ok.<a>(2)bye.", "<u>so.<a>(1)la."]
    scored = ["".join(chr(window.tokens[place]) for place in window.scored) for window in found.windows]
    assert scored == ["(1)yo.", "(2)bye.", "(1)la."]
    assert [(window.block, window.place) for window in found.windows] == [(0, "line 1"), (0, "line 1"), (1, "line 2")]
    assert "renders earlier turns anew" in found.protocol.sentence


def test_what_belongs_to_a_prompt_is_not_scored() -> None:
    talk = chat("hi", "yo", "ok", "bye")
    (window,) = usual(DriftText((Entry(talk, "line 1", prompt_messages=3),))).windows
    assert "".join(chr(window.tokens[place]) for place in window.scored) == "bye."


def test_windows_say_where_they_stand() -> None:
    found = usual(running("abcdef", "gh"), 5).windows
    assert [window.place for window in found] == ["tokens 0 to 3", "tokens 4 to 7", "tokens 8 to 9"]
    assert [window.block for window in found] == [0, 1, 2]


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=9), wanted=st.integers(1, 40))
def test_the_first_windows_are_the_fewest_that_suffice(counts: list[int], wanted: int) -> None:
    whole = usual(chats(*(chat("q", "a" * count) for count in counts)))
    part = first_windows(whole, wanted)
    assert part.windows == whole.windows[: len(part.windows)]
    assert part.count >= min(wanted, whole.count)
    assert part.count - len(part.windows[-1].scored) < wanted


def test_a_chat_that_the_template_refuses(tmp_path: Path) -> None:
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / "base" / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="the chat template refuses a chat: roles must alternate"):
        FolderTokenizer(tmp_path).render(DIALOGUE, answering=False)


def test_a_chat_that_begins_with_the_assistant() -> None:
    with pytest.raises(InputError, match="line 1: a chat begins with the assistant"):
        usual(chats(({"role": "assistant", "content": "x"},)))


def test_the_demos_tokenizer() -> None:
    tokenizer = FolderTokenizer(DEMO / "base")
    (window,) = token_set(chats(tuple(DIALOGUE)), tokenizer, SizedProtocol("windows", "windows", 512), None).windows
    assert window.tokens[0] == tokenizer.begin
    text = tokenizer.encode(DIALOGUE[1]["content"])
    assert [window.tokens[position] for position in window.scored][: len(text)] == text
