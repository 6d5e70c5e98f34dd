"""Multiple choice: which answers flip. Two models of one accuracy can disagree on many questions.

    score(choice) = sum over its tokens of ln p(token | question, tokens before)      the highest is the model's answer

as lm-evaluation-harness' `acc`: question and choice are tokenized together, with a space between them where neither has
one and what the tokenizer puts around a text by itself, and the tokens beyond those of the question alone are the
choice's. A conversation is rendered by the chat template
up to the answer, and the choice follows it at once. Cost: a window for each choice. Lost and gained answers are told
from chance by McNemar's exact test, two-sided: each flip is as likely to go either way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlora_export.drift.batches import batched_rows
from qlora_export.drift.tokens import Window
from qlora_export.errors import InputError
from qlora_export.runtimes.base import Session
from qlora_export.sources.questions import Question
from qlora_export.sources.tokenizer import Tokenizer
from qlora_export.types import Progress

SHOWN = 100
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class AskedQuestion:
    """A question, and for each choice a window that scores its tokens."""

    question: Question
    windows: tuple[Window, ...]


@dataclass(frozen=True)
class Answered:
    """The number of the right answer, and of those of both models; None where a model gives no number."""

    right: int
    reference: int | None
    candidate: int | None


@dataclass(frozen=True)
class Flip:
    """A question that the models answer differently: the right answer, and theirs."""

    place: str
    question: str
    answer: str
    reference: str
    candidate: str


@dataclass(frozen=True)
class Choices:
    """How many of the items both models answer right; `lost` are those that only the reference does.

    `flipped` has the lost ones first, then the gained ones, then those that both answer wrong, `SHOWN` at most.
    """

    items: int
    accuracy_reference: float
    accuracy: float
    accuracy_stderr: float
    lost: int
    gained: int
    p_value: float
    flipped: tuple[Flip, ...]


def asked_questions(
    questions: Sequence[Question], tokenizer: Tokenizer, context: int | None, origin: str
) -> tuple[AskedQuestion, ...]:
    """The windows of each question; raises InputError for one that the model's context does not hold."""
    found = []
    for number, question in enumerate(questions):
        windows = [_window(question, choice, number, tokenizer, origin) for choice in question.choices]
        longest = max(len(window.tokens) for window in windows)
        if context is not None and longest > context:
            raise InputError(
                f"{origin}: {question.place} has {longest} tokens with its choice, the model's context is {context}",
                "shorten the question, or leave it out",
            )
        found.append(AskedQuestion(question, tuple(windows)))
    return tuple(found)


def score_choices(session: Session, asked: Sequence[AskedQuestion], progress: Progress) -> Scores:
    """The score of every choice, question after question, [choices of all]; -inf where the model gives no number."""
    windows = [window for item in asked for window in item.windows]
    scores = np.empty(len(windows))
    for number, rows in enumerate(batched_rows(session, windows)):
        window = windows[number]
        chosen = rows[np.arange(len(rows)), [window.tokens[place] for place in window.scored]]
        scores[number] = chosen.astype(np.float64).sum()
        progress(number + 1, len(windows))
    return np.where(np.isnan(scores), -np.inf, scores)


def compare_choices(asked: Sequence[AskedQuestion], reference: Scores, candidate: Scores) -> Choices:
    """What both models answer, by the scores of all choices."""
    answers = zip(asked, _answers(asked, reference), _answers(asked, candidate), strict=True)
    answered = [Answered(item.question.answer, first, second) for item, first, second in answers]
    return compare_answers(answered, lambda number: _flip(asked[number].question, answered[number]))


def compare_answers(answered: Sequence[Answered], flip: Callable[[int], Flip]) -> Choices:
    """Accuracy of both models and what flipped; `flip` tells of the item of a number."""
    right = [(item.reference == item.right, item.candidate == item.right) for item in answered]
    lost, gained = right.count((True, False)), right.count((False, True))
    accuracy = sum(second for _, second in right) / len(right)
    variance = accuracy * (1 - accuracy) / (len(right) - 1) if len(right) > 1 else math.nan
    flipped = [number for number, item in enumerate(answered) if item.reference != item.candidate]
    flipped.sort(key=lambda number: (0 if right[number][0] else 1 if right[number][1] else 2, number))
    return Choices(
        items=len(right),
        accuracy_reference=sum(first for first, _ in right) / len(right),
        accuracy=accuracy,
        accuracy_stderr=math.sqrt(variance),
        lost=lost,
        gained=gained,
        p_value=mcnemar(lost, gained),
        flipped=tuple(map(flip, flipped[:SHOWN])),
    )


def mcnemar(lost: int, gained: int) -> float:
    """How likely so uneven a split, or a more uneven one, is by chance."""
    total = lost + gained
    tail = sum(math.comb(total, count) for count in range(min(lost, gained) + 1))
    return float(min(1.0, 2 * tail / 2**total))


def _window(question: Question, choice: str, number: int, tokenizer: Tokenizer, origin: str) -> Window:
    if isinstance(question.content, str):
        before, encode = question.content.rstrip(), tokenizer.encode_whole
        between = question.content[len(before) :] or ("" if choice[0].isspace() else " ")
    else:
        before, encode, between = tokenizer.render(question.content, answering=True), tokenizer.encode, ""
    first, tokens = len(encode(before)), encode(before + between + choice)
    if not 0 < first < len(tokens):
        raise InputError(
            f"{origin}: {question.place}: the choice {choice!r} adds no token to its question",
            "write the choices so that the question ends before they begin",
        )
    return Window(tuple(tokens), tuple(range(first, len(tokens))), question.place, number)


def _answers(asked: Sequence[AskedQuestion], scores: Scores) -> list[int | None]:
    """The number of each question's choice with the highest score; None where none has a number."""
    ends = np.cumsum([len(item.windows) for item in asked])[:-1]
    return [int(part.argmax()) if np.isfinite(part).any() else None for part in np.split(scores, ends)]


def _flip(question: Question, item: Answered) -> Flip:
    chosen = (item.right, item.reference, item.candidate)
    texts = ["" if number is None else question.choices[number] for number in chosen]
    return Flip(question.place, question.text, *texts)
