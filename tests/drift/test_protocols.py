"""Which tokens each protocol scores, on tokens that are letters, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_export.drift.protocols import token_set
from qlora_export.drift.running_text import disjoint_windows, half_scored_chunks, rolling_windows, strided_windows
from qlora_export.drift.tokens import TokenSet, Window
from qlora_export.drift.window_sizes import SizedProtocol, recorded_protocol, sized
from qlora_export.errors import InputError, UsageError
from qlora_export.recipe.load import make_recipe
from qlora_export.recipe.protocols import choose_protocol
from qlora_export.report.tokens import protocol_line, tokens_data
from qlora_export.sources.model_config import context_tokens
from qlora_export.sources.text import DriftText
from tests.drift.test_tokens import Letters, chat, chats, running

IDS = st.lists(st.integers(2, 9), min_size=1, max_size=70)
SIZES = st.integers(2, 20)


def places(windows: list[Window], start_of: list[int]) -> list[int]:
    """Which places of the text are scored, in order, for windows that start at these."""
    return [start + place for window, start in zip(windows, start_of, strict=True) for place in window.scored]


@given(ids=IDS, size=SIZES)
def test_disjoint_windows_score_all_but_their_first(ids: list[int], size: int) -> None:
    windows = list(disjoint_windows(ids, size))
    starts = [size * number for number in range(len(ids) // size)]
    assert [window.tokens for window in windows] == [tuple(ids[start : start + size]) for start in starts]
    assert places(windows, starts) == [place for place in range(len(ids) // size * size) if place % size]


@given(ids=IDS, size=st.integers(3, 20), begin=st.none() | st.just(0))
def test_chunks_score_their_second_half(ids: list[int], size: int, begin: int | None) -> None:
    windows = list(half_scored_chunks(ids, begin, size))
    starts = [size * number for number in range(len(ids) // size)]
    assert places(windows, starts) == [place for place in range(len(starts) * size) if place % size > size // 2]
    for window, start in zip(windows, starts, strict=True):
        assert window.tokens[1:] == tuple(ids[start + 1 : start + size])
        assert window.tokens[0] == (ids[start] if begin is None else begin)


@given(ids=IDS, size=SIZES, data=st.data())
def test_strided_windows_score_every_token_once(ids: list[int], size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size))
    windows = list(strided_windows(ids, size, stride))
    starts = [stride * number for number in range(len(windows))]
    assert all(window.tokens == tuple(ids[at : at + size]) for window, at in zip(windows, starts, strict=True))
    # Where windows do not overlap, nothing comes before the first token of any.
    unscored = starts if stride == size else [0]
    assert places(windows, starts) == [place for place in range(len(ids)) if place not in unscored]
    assert all(len(window.tokens) - min(window.scored, default=0) <= stride for window in windows[1:])


@given(ids=IDS, size=SIZES)
def test_rolling_windows_score_every_token_once(ids: list[int], size: int) -> None:
    windows = list(rolling_windows(ids, 0, size, 3, "line 4"))
    assert [window.tokens[place] for window in windows for place in window.scored] == ids
    assert all(len(window.fed) <= size and window.block == 3 for window in windows)
    assert windows[0].tokens[0] == 0
    assert all(len(window.fed) == size for window in windows[1:]), "the last reaches back"
    assert windows[0].place == ("line 4" if len(ids) <= size else f"line 4, tokens 0 to {size - 1}")


def made(text: DriftText, name: str, context: int | None = 64, limit: int | None = None, **changes: Any) -> TokenSet:
    tokenizer = Letters()
    sizes = {key: changes.pop(key) for key in ("window_tokens", "stride_tokens") if key in changes}
    for key, value in changes.items():
        setattr(tokenizer, key, value)
    return token_set(text, tokenizer, sized(choose_protocol(name, **sizes), context), limit)


def test_joined_text_is_encoded_once_with_the_tokenizers_own_begin_token() -> None:
    found = made(running("abc", "defghijk"), "disjoint-8", added=(0,))
    assert "".join(map(chr, found.windows[0].tokens)) == "\0abc\n\ndef"[:8]
    assert found.protocol.begin == "the begin token at the very start"
    plain = made(running("abc", "defghijk"), "disjoint-8")
    assert "".join(map(chr, plain.windows[0].tokens)) == "abc\n\ndef"
    assert plain.protocol.begin is None
    assert "no begin token" in plain.protocol.sentence


def test_llama_cpp_begins_every_chunk_where_the_tokenizer_adds_a_begin_token() -> None:
    text = running("abcdefghijklmnop")
    found = made(text, "llama.cpp-8", added=(0,))
    assert ["".join(map(chr, window.tokens)) for window in found.windows] == ["\0abcdefg", "\0ijklmno"]
    assert [window.scored for window in found.windows] == [(5, 6, 7)] * 2
    plain = made(text, "llama.cpp-8")
    assert ["".join(map(chr, window.tokens)) for window in plain.windows] == ["abcdefgh", "ijklmnop"]
    assert (found.protocol.begin, plain.protocol.begin) == ("the begin token in place of the first of each", None)


def test_documents_are_scored_whole() -> None:
    found = made(running("ab c", "", "defgh"), "lm-eval-rolling", added=(0,))
    assert ["".join(map(chr, window.tokens)) for window in found.windows] == ["\0\0ab c", "\0\0", "\0\0defgh"]
    assert [window.place for window in found.windows] == ["line 1", "line 2", "line 3"]
    assert found.protocol.begin == "the begin token before each document, and the one that the tokenizer adds, scored"
    assert found.documents is not None
    assert (found.documents.count, found.documents.words, found.documents.bytes) == (3, 4, 9)
    begun = made(running("\0ab"), "lm-eval-rolling", added=(0,))
    assert begun.windows[0].tokens == (0, 0, ord("a"), ord("b")), "what begins with the token is given no other"
    ended = made(running("ab"), "lm-eval-rolling", begin=None)
    assert ended.windows[0].tokens[0] == Letters.end
    assert ended.protocol.begin == "the end token before each document"
    with pytest.raises(InputError, match="neither a begin nor an end token"):
        made(running("ab"), "lm-eval-rolling", begin=None, end=None)


def test_a_limit_keeps_documents_whole() -> None:
    found = made(running("a" * 30, "b" * 30, "c" * 30), "lm-eval-rolling", limit=31, window_tokens=8)
    assert found.count == 60
    assert found.documents is not None
    assert (found.documents.count, found.documents.bytes) == (2, 60)
    assert {window.block for window in found.windows} == {0, 1}


@pytest.mark.parametrize("name", ["disjoint-8", "strided", "llama.cpp-8", "lm-eval-rolling"])
def test_named_protocols_are_for_running_text(name: str) -> None:
    with pytest.raises(UsageError, match=f"protocol {name} is for running text, and the text for drift is 1 chats"):
        made(chats(chat("hi", "yo")), name, stride_tokens=8 if name == "strided" else None)


@pytest.mark.parametrize("name", ["disjoint-40", "llama.cpp-40"])
def test_text_shorter_than_a_window(name: str) -> None:
    with pytest.raises(InputError, match=f"protocol {name} scores whole windows of 40 tokens, .* has 39") as caught:
        made(running("a" * 39), name)
    assert caught.value.hint == f"give more text, or take a smaller window, as in {name[:-3]}-19"


@pytest.mark.parametrize("name", ["windows", "disjoint-8", "strided", "llama.cpp-8", "lm-eval-rolling"])
@pytest.mark.parametrize("text", [(), ("",), ("", "")])
def test_empty_text(name: str, text: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="the text for drift is empty") as caught:
        made(running(*text), name, stride_tokens=8 if name == "strided" else None)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "sizes", "window", "stride"),
    [
        ("windows", {}, 64, None),
        ("windows", {"window_tokens": 32}, 32, None),
        ("disjoint-48", {}, 48, None),
        ("llama.cpp-64", {}, 64, None),
        ("strided", {"stride_tokens": 16}, 64, 16),
        ("strided", {"stride_tokens": 16, "window_tokens": 32}, 32, 16),
        ("lm-eval-rolling", {}, 64, None),
        ("lm-eval-rolling", {"window_tokens": 10}, 10, None),
    ],
)
def test_sizes(name: str, sizes: dict[str, int], window: int, stride: int | None) -> None:
    found = sized(choose_protocol(name, **sizes), 64)
    assert (found.name, found.window_tokens, found.stride_tokens) == (name, window, stride)


def test_sizes_of_a_model_that_states_no_context() -> None:
    assert sized(choose_protocol("windows"), None).window_tokens == 1024
    assert sized(choose_protocol("windows"), 4096).window_tokens == 1024
    assert sized(choose_protocol("lm-eval-rolling"), None).window_tokens == 2048
    assert sized(choose_protocol("strided", 1024), None).stride_tokens == 512
    with pytest.raises(UsageError, match="does not state the model's context"):
        sized(choose_protocol("strided"), None)


@pytest.mark.parametrize(
    ("name", "sizes", "message", "hint"),
    [
        ("disjoint-2048", {}, "windows of 2048 tokens, and the model's context is 64", "take disjoint-64 or less"),
        ("llama.cpp-65", {}, "windows of 65 tokens, and the model's context is 64", "take llama.cpp-64 or less"),
        ("windows", {"window_tokens": 65}, "context is 64", "set drift.window_tokens to at most 64"),
        ("lm-eval-rolling", {"window_tokens": 65}, "context is 64", "set drift.window_tokens to at most 64"),
        ("strided", {}, "a stride of 512 tokens skips some", "set drift.stride_tokens to at most 64"),
        ("windows", {"stride_tokens": 9}, "windows has no stride", "take protocol strided"),
        ("disjoint-32", {"window_tokens": 9}, "the window of disjoint-32 is in its name", "name disjoint-9"),
        ("disjoint-7", {}, "windows of 7 tokens", "8 are the fewest"),
        ("stridden", {}, "unknown protocol 'stridden'", "did you mean strided?"),
        ("llama.cpp", {}, "unknown protocol 'llama.cpp'", "did you mean llama.cpp-512?"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, sizes: dict[str, int], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        sized(choose_protocol(name, **sizes), 64)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_recipe_names_a_protocol() -> None:
    data = {"base": "b", "artifacts": ["bf16"], "drift": {"text": "t", "protocol": "strided", "stride_tokens": 64}}
    drift = make_recipe(data, Path(), "test").drift
    assert drift is not None
    assert (drift.protocol, drift.window_tokens, drift.stride_tokens) == ("strided", None, 64)
    with pytest.raises(UsageError, match=r"unknown protocol 'wikitext'"):
        make_recipe(data, Path(), "test", ["drift.protocol=wikitext"])
    with pytest.raises(UsageError, match=r"drift.stride_tokens: windows has no stride"):
        make_recipe(data, Path(), "test", ["drift.protocol=windows"])


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 128}, 128),
        ({"n_positions": 64, "n_ctx": 32}, 64),
        ({"max_seq_len": 512}, 512),
        ({"max_position_embeddings": None}, None),
        ({}, None),
    ],
)
def test_the_context_that_a_config_states(config: dict[str, Any], context: int | None) -> None:
    assert context_tokens(config) == context


@pytest.mark.parametrize("name", ["windows", "disjoint-8", "strided", "llama.cpp-8", "lm-eval-rolling"])
def test_a_report_makes_the_same_tokens_again(name: str) -> None:
    text = running("abcdefg hijk", "lmnop" * 20)
    sizes = {"stride_tokens": 5} if name == "strided" else {}
    found = made(text, name, context=16, **sizes)
    told = tokens_data(found)
    again = token_set(text, Letters(), recorded_protocol(told), None)
    assert again == found
    assert (told["name"], told["windows"], told["sha256"]) == (name, len(found.windows), found.sha256)
    assert protocol_line(told) == f"protocol {name}: {found.protocol.sentence} ({len(found.windows)} windows)"


def test_a_report_of_an_earlier_release_is_by_the_usual_protocol() -> None:
    told = {"protocol": "joined text", "window_tokens": 1024}
    assert recorded_protocol(told) == SizedProtocol("windows", "windows", 1024)
    assert protocol_line(told) == "protocol windows: joined text"
