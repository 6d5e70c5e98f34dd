from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_export.engine.calibration.text import (
    CalibrationTokens,
    calibration_tokens,
    read_calibration,
    sequence_counts,
)
from qlora_export.errors import InputError
from qlora_export.recipe.calibration import CalibrationRecipe
from qlora_export.runtimes.tokenizer import FolderTokenizer
from qlora_export.sources.windows import text_windows
from tests.drift.test_tokens import Letters
from tests.helpers.pico import DEMO, DIALOGUE

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def chats(path: Path, count: int) -> None:
    talks = [
        [{"role": "user", "content": f"q{number:03}"}, {"role": "assistant", "content": "yes"}]
        for number in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))


def tokens(folder: Path, section: Any) -> CalibrationTokens:
    recipe = CalibrationRecipe.model_validate(section)
    return calibration_tokens(recipe, read_calibration(recipe, folder), Letters())


def letters(found: CalibrationTokens) -> list[str]:
    return ["".join(map(chr, window)) for window in found.windows]


@given(ids=st.lists(st.integers(1, 99), max_size=70), window=st.integers(2, 20), begin=st.none() | st.just(0))
def test_windows_are_disjoint_and_hold_every_token(ids: list[int], window: int, begin: int | None) -> None:
    found = list(text_windows(ids, begin, window))
    lead = 0 if begin is None else 1
    assert [token for piece in found for token in piece[lead:]] == ids
    assert all(len(piece) == window for piece in found[:-1])
    assert all(lead < len(piece) <= window and piece[:lead] == (begin,)[:lead] for piece in found)


@given(weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=8), sequences=st.integers(1, 500))
def test_counts_come_to_the_sequences_and_follow_the_shares(weights: list[float], sequences: int) -> None:
    counts = sequence_counts(weights, sequences)
    assert sum(counts) == sequences
    total = math.fsum(weights)
    assert all(
        abs(count - weight / total * sequences) < 1 + 1e-9 for count, weight in zip(counts, weights, strict=True)
    )


def test_a_chat_is_one_window_and_long_ones_are_cut(tmp_path: Path) -> None:
    lines = [TALK, [*TALK, {"role": "user", "content": "x" * 50}]]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in lines))
    found = tokens(tmp_path, {"text": "a.jsonl", "window_tokens": 20})
    assert sorted(letters(found)) == ["<u>hi.<a>yo.", "<u>hi.<a>yo.<u>xxxxx"]


def test_drawing_is_by_seed_and_more_holds_fewer(tmp_path: Path) -> None:
    chats(tmp_path / "a.jsonl", 200)
    found = {seed: tokens(tmp_path, {"text": "a.jsonl", "sequences": 64, "seed": seed}) for seed in (0, 1)}
    assert found[0] == tokens(tmp_path, {"text": "a.jsonl", "sequences": 64})
    assert found[0].sha256 != found[1].sha256
    assert len(set(found[0].windows)) == 64
    assert set(found[0].windows) < set(tokens(tmp_path, {"text": "a.jsonl", "sequences": 100}).windows)
    assert found[0].notes == ()
    # Kept numbers: the order must not depend on a library.
    assert letters(found[0])[:3] == ["<u>q070.<a>yes.", "<u>q037.<a>yes.", "<u>q057.<a>yes."]


def test_a_mixture_is_drawn_by_share_and_counted(tmp_path: Path) -> None:
    chats(tmp_path / "task.jsonl", 100)
    (tmp_path / "general.txt").write_text("w" * 900)
    mixture = [{"text": "task.jsonl", "share": 0.75}, {"text": "general.txt", "share": 0.25}]
    found = tokens(tmp_path, {"mixture": mixture, "sequences": 80, "window_tokens": 10})
    assert [(part.name, part.windows, part.tokens, part.available) for part in found.parts] == [
        ("task.jsonl", 60, 600, 100), ("general.txt", 20, 200, 100),
    ]  # fmt: skip
    assert (found.sequences, found.tokens) == (80, 800)
    assert all(window[0] == 0 for window in found.windows[60:])
    other = tokens(tmp_path, {"mixture": mixture[::-1], "sequences": 80, "window_tokens": 10})
    assert other.sha256 != found.sha256


def test_too_few_are_all_taken_and_said(tmp_path: Path) -> None:
    chats(tmp_path / "a.jsonl", 40)
    found = tokens(tmp_path, {"text": "a.jsonl"})
    assert found.sequences == 40
    assert found.notes == (
        "calibration: a.jsonl has 40 of the 128 sequences asked for: all are taken",
        "calibration: 40 sequences are few; give 64 or more, 128 are usual",
    )


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_no_text_at_all(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"a\.jsonl: the text for calibration has no token"):
        tokens(tmp_path, {"text": "a.jsonl"})
    with pytest.raises(InputError, match=r"none\.txt: no such text"):
        tokens(tmp_path, {"text": "none.txt"})


def test_the_demos_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": DIALOGUE}))
    recipe = CalibrationRecipe(text="a.jsonl")
    tokenizer = FolderTokenizer(DEMO / "base")
    (window,) = calibration_tokens(recipe, read_calibration(recipe, tmp_path), tokenizer).windows
    assert list(window) == tokenizer.encode(tokenizer.render(DIALOGUE, answering=False))
    assert window[0] == tokenizer.begin
