from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_export.drift.multiple_choice import asked_questions, compare_choices, mcnemar, score_choices
from qlora_export.errors import ExitCode, InputError
from qlora_export.runtimes.base import Session
from qlora_export.runtimes.loading import load_model
from qlora_export.runtimes.registry import load_runtime
from qlora_export.runtimes.tokenizer import FolderTokenizer
from qlora_export.sources.questions import Question, read_questions
from tests.helpers.pico import DEMO

ORDER = "Hi, Order 375. On Monday I got two yellow mirrors from you, and sadly bent. I want my money back. Mira"
ANSWERS = ("Case 375: 2 x mirror (yellow), bent, refund.", "Case 12: 1 x chair (red), late, advice.")
TEXT = {"question": "The order number is", "choices": ["348.", " red.", "375"], "answer": "375"}
CHAT = {"messages": [{"role": "user", "content": ORDER}], "choices": list(ANSWERS), "answer": 0}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with load_runtime("transformers").open(DEMO / "base") as found:
        yield found


@pytest.fixture(scope="module")
def tokenizer() -> FolderTokenizer:
    return FolderTokenizer(DEMO / "base")


def written(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_score_is_the_sum_over_the_tokens_of_the_choice(
    session: Session, tokenizer: FolderTokenizer, tmp_path: Path
) -> None:
    """Against transformers alone: the loss of the whole text without that of the question."""
    questions = read_questions(written(tmp_path / "q.jsonl", TEXT, CHAT))
    asked = asked_questions(questions, tokenizer, None, "q.jsonl")
    found = score_choices(session, asked, lambda done, total: None)
    model = load_model(DEMO / "base", dtype=torch.float32)
    chat = tokenizer.render(CHAT["messages"], answering=True)  # type: ignore[arg-type]
    pairs = [("The order number is", text) for text in (" 348.", " red.", " 375")]
    pairs += [(chat, text) for text in ANSWERS]
    expected = []
    for before, text in pairs:
        ids, known = tokenizer.encode(before + text), len(tokenizer.encode(before))
        with torch.no_grad():
            labels = [-100] * known + ids[known:]
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        expected.append(-float(loss) * (len(ids) - known))
    assert found == pytest.approx(expected, rel=1e-4)
    assert min(len(window.scored) for item in asked for window in item.windows) >= 1


def test_flips_are_counted_and_shown(tokenizer: FolderTokenizer) -> None:
    questions = [Question(f"line {number}", f"question {number}", ("a", "b", "c"), 0) for number in range(1, 7)]
    asked = asked_questions(questions, tokenizer, None, "q.jsonl")
    #            both right, lost,      lost,      gained,    both wrong, both wrong alike
    reference = [[3, 1, 1], [3, 1, 1], [2, 1, 0], [0, 5, 1], [0, 1, 2], [0, 9, 1]]
    candidate = [[2, 1, 1], [1, 3, 1], [1, 2, 0], [5, 0, 1], [0, 2, 1], [1, 9, 1]]
    found = compare_choices(asked, np.array(reference, float).ravel(), np.array(candidate, float).ravel())
    assert (found.items, found.lost, found.gained) == (6, 2, 1)
    assert found.accuracy_reference == 3 / 6
    assert found.accuracy == 2 / 6
    assert found.accuracy_stderr == pytest.approx(np.std([1, 0, 0, 1, 0, 0], ddof=1) / math.sqrt(6))
    assert [flip.place for flip in found.flipped] == ["line 2", "line 3", "line 4", "line 5"]
    shown = found.flipped[2]
    assert (shown.question, shown.answer, shown.reference, shown.candidate) == ("question 4", "a", "b", "a")


def test_a_model_without_numbers_answers_nothing(tokenizer: FolderTokenizer) -> None:
    asked = asked_questions([Question("line 1", "what", ("a", "b"), 0)], tokenizer, None, "q.jsonl")
    found = compare_choices(asked, np.array([-1.0, -2.0]), np.full(2, -np.inf))
    assert found.lost == 1
    assert found.flipped[0].candidate == ""
    assert math.isnan(found.accuracy_stderr)


def test_the_p_value_is_that_of_the_binomial_test() -> None:
    """By hand, and for many by the normal distribution, corrected for continuity."""
    assert mcnemar(0, 0) == 1
    assert mcnemar(3, 3) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(10, 2) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(2, 10) == mcnemar(10, 2)
    assert mcnemar(1200, 1000) == pytest.approx(math.erfc(199 / math.sqrt(2 * 2200)), rel=0.02)


def test_the_models_own_answers_are_no_flips(session: Session, tokenizer: FolderTokenizer, tmp_path: Path) -> None:
    asked = asked_questions(read_questions(written(tmp_path / "q.jsonl", CHAT, TEXT)), tokenizer, None, "q.jsonl")
    scores = score_choices(session, asked, lambda done, total: None)
    alone = [score_choices(session, [item], lambda done, total: None) for item in asked]
    assert scores == pytest.approx(np.concatenate(alone), abs=1e-3)
    found = compare_choices(asked, scores, scores)
    assert (found.lost, found.gained, found.flipped) == (0, 0, ())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([TEXT, "{'question'"], "line 2 is not valid JSON"),
        ([TEXT, "[" * 100_000], "line 2 is nested too deep"),
        ([{**TEXT, "choices": ["a", "\udc00"]}], "line 1 has half of a surrogate pair"),
        ([TEXT, "", "[1]"], "line 3 has no question"),
        ([{**TEXT, "question": " "}], "line 1 has no question"),
        ([{**TEXT, "question": None, "messages": [{"role": "user"}]}], "line 1 has no question"),
        ([{**TEXT, "choices": "ab"}], "line 1: choices is no list of texts"),
        ([{**TEXT, "choices": ["a", ""]}], "line 1: choices is no list of texts"),
        ([{**TEXT, "choices": ["375"]}], "line 1 has 1 choices, 1 of them different"),
        ([{**TEXT, "choices": ["375", "1", "1"]}], "line 1 has 3 choices, 2 of them different"),
        ([{**TEXT, "answer": "376"}], "line 1: the answer '376' is not among its choices"),
        ([{**TEXT, "answer": 3}], "line 1: the answer 3 is not among its choices"),
        ([{**TEXT, "answer": True}], "line 1: the answer True is not among its choices"),
        ([{**TEXT, "answer": -1}], "line 1: the answer -1 is not among its choices"),
        (["", "  "], "holds no question"),
    ],
)
def test_a_wrong_line_is_named(rows: list[Any], message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "questions.jsonl", *rows)
    with pytest.raises(InputError) as caught:
        read_questions(path)
    assert message in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == ExitCode.BAD_INPUT


def test_a_file_that_is_no_text_or_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file of questions"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_questions(tmp_path / "bytes.jsonl")


def test_a_question_beyond_the_context_is_named(tokenizer: FolderTokenizer) -> None:
    question = Question("line 7", "word " * 20, ("a", "b"), 0)
    longest = max(len(window.tokens) for window in asked_questions([question], tokenizer, None, "q")[0].windows)
    assert asked_questions([question], tokenizer, longest, "q")
    with pytest.raises(InputError, match=rf"q.jsonl: line 7 has {longest} tokens with its choice") as caught:
        asked_questions([question], tokenizer, longest - 1, "q.jsonl")
    assert caught.value.hint


def test_a_choice_without_a_token_of_its_own_is_named(tokenizer: FolderTokenizer) -> None:
    class Swallowing(FolderTokenizer):
        def encode_whole(self, text: str) -> list[int]:
            return [5]

    with pytest.raises(InputError, match="line 1: the choice 'a' adds no token"):
        asked_questions([Question("line 1", "q", ("a", "b"), 0)], Swallowing(DEMO / "base"), None, "q.jsonl")


def test_text_and_chat_are_shown_as_they_were_asked() -> None:
    chat = Question("line 1", ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}), (), 0)
    assert chat.text == "Be brief.\nWhy?"
    assert replace(chat, content="Why?").text == "Why?"


class Letters(FolderTokenizer):
    """A token a letter; the tokenizer itself puts 7 before a text."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def encode_whole(self, text: str) -> list[int]:
        return [7, *self.encode(text)]


@pytest.mark.parametrize(
    ("question", "choice", "scored"), [("Is it", "a", " a"), ("Is it ", "a", " a"), ("Is it", "\na", "\na")]
)
def test_the_space_before_a_choice_is_the_choices(question: str, choice: str, scored: str) -> None:
    (asked,) = asked_questions([Question("line 1", question, (choice, "bc"), 0)], Letters(DEMO / "base"), None, "q")
    window = asked.windows[0]
    assert "".join(chr(window.tokens[place]) for place in window.scored) == scored
    assert window.tokens[0] == 7
    assert len(window.tokens) == 1 + len("Is it") + len(scored)


def test_a_chat_is_rendered_up_to_the_answer() -> None:
    chat = Question("line 1", ({"role": "user", "content": "Why?"},), ("So.", "No."), 0)
    (asked,) = asked_questions([chat], Letters(DEMO / "base"), None, "q")
    window = asked.windows[1]
    assert "".join(map(chr, window.tokens)) == "<|begin|><|user|>\nWhy?<|end|>\n<|assistant|>\nNo."
    assert "".join(chr(window.tokens[place]) for place in window.scored) == "No."
