"""What a check asks beside its text, where the recipe says so: questions with choices, and prompts to go on with.

What the reference says is kept in columns beside its distributions: the scores of all choices, and the tokens that it
wrote, with their number for each prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from qlora_export.drift.generation import Generation, Prompt, compare_generation, generate, prompts_of
from qlora_export.drift.multiple_choice import AskedQuestion, Choices, asked_questions, compare_choices, score_choices
from qlora_export.drift.reference_store import Columns
from qlora_export.drift.worst_tokens import Decode
from qlora_export.recipe.config import DriftRecipe
from qlora_export.runtimes.base import Session
from qlora_export.sources.questions import Question, read_questions
from qlora_export.sources.text import read_entries
from qlora_export.sources.text_entries import Entry
from qlora_export.sources.tokenizer import Tokenizer
from qlora_export.sources.windows import digest_of_tokens
from qlora_export.types import Track

SCORES, WRITTEN, LENGTHS = "choices.scores", "generation.tokens", "generation.lengths"


@dataclass(frozen=True)
class ProbeTexts:
    """Questions and prompts as they were read, and the names of their files."""

    questions: tuple[Question, ...] = ()
    prompts: tuple[Entry, ...] = ()
    generate_tokens: int = 64
    names: tuple[str, str] = ("", "")

    def tokens(self, tokenizer: Tokenizer, context: int | None) -> Probes:
        """The same in tokens; raises InputError for what a model of this context cannot read."""
        questions, prompts = self.names
        return Probes(
            asked_questions(self.questions, tokenizer, context, questions),
            prompts_of(self.prompts, tokenizer, self.generate_tokens, context, prompts) if prompts else (),
            self.generate_tokens,
        )


NO_TEXTS = ProbeTexts()


@dataclass(frozen=True)
class Probes:
    """Questions and prompts in tokens; none where nothing is asked."""

    questions: tuple[AskedQuestion, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    generate_tokens: int = 64

    @property
    def key(self) -> Mapping[str, Any]:
        """What decides the answers of a reference, beside the model."""
        found: dict[str, Any] = {}
        if self.questions:
            windows = [window for item in self.questions for window in item.windows]
            found["choices"] = digest_of_tokens(chain.from_iterable((item.tokens, item.scored) for item in windows))
        if self.prompts:
            found["prompts"] = digest_of_tokens(item.tokens for item in self.prompts)
            found["generate_tokens"] = self.generate_tokens
        return found

    @property
    def highest_token(self) -> int:
        """The highest id among all tokens; 0 where nothing is asked."""
        windows = (window.tokens for item in self.questions for window in item.windows)
        return max(chain.from_iterable((*windows, *(item.tokens for item in self.prompts))), default=0)


NO_PROBES = Probes()


@dataclass(frozen=True)
class Answers:
    """What an artifact made of the probes; None for what was not asked."""

    choices: Choices | None = None
    generation: Generation | None = None


NO_ANSWERS = Answers()


def read_probes(drift: DriftRecipe, folder: Path) -> ProbeTexts:
    """Questions and prompts of a recipe, whose paths start at `folder`; raises InputError naming file and line."""
    questions = folder / Path(drift.choices).expanduser() if drift.choices else None
    return ProbeTexts(
        read_questions(questions) if questions else (),
        read_entries(drift.prompts, folder) if drift.prompts else (),
        drift.generate_tokens,
        (str(questions or ""), drift.prompts or ""),
    )


def ask_reference(session: Session, probes: Probes, track: Track) -> Columns:
    """The reference's answers as columns to keep."""
    found: dict[str, Any] = {}
    if probes.questions:
        with track("choices of the reference") as progress:
            found[SCORES] = score_choices(session, probes.questions, progress)
    if probes.prompts:
        with track("the reference writes") as progress:
            written = generate(session, probes.prompts, probes.generate_tokens, progress)
        found[WRITTEN] = np.array(list(chain.from_iterable(written)), np.int64)
        found[LENGTHS] = np.array([len(tokens) for tokens in written], np.int64)
    return found


def ask(session: Session, probes: Probes, reference: Columns, decode: Decode, track: Track) -> Answers:
    """An artifact's answers beside those of the reference."""
    choices, generation = None, None
    if probes.questions:
        with track("choices") as progress:
            scores = score_choices(session, probes.questions, progress)
        choices = compare_choices(probes.questions, reference[SCORES], scores)
    if probes.prompts:
        ends = np.cumsum(reference[LENGTHS])[:-1]
        written = [tuple(part.tolist()) for part in np.split(reference[WRITTEN], ends)]
        with track("agreement") as progress:
            count = probes.generate_tokens
            generation = compare_generation(session, probes.prompts, written, count, decode, progress)
    return Answers(choices, generation)
