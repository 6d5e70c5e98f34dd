"""Greedy generation: for how many tokens a candidate would write what the reference wrote.

The reference goes on with each prompt by its most likely token, until a token that ends a text. The candidate reads
prompt and continuation at once: up to the first place where its own most likely token is another, greedy decoding would
have given it the same tokens to read, so that this place is where it would have left them. Cost: a pass over the
reference's tokens for each artifact; the few continuations that are shown are generated, where the session can.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray

from qlora_export.drift.batches import batched_rows
from qlora_export.drift.tokens import Window
from qlora_export.drift.worst_tokens import Decode
from qlora_export.errors import InputError, UsageError
from qlora_export.runtimes.base import GreedySession, Session
from qlora_export.sources.text_entries import Entry
from qlora_export.sources.tokenizer import Tokenizer
from qlora_export.types import Progress

SHOWN = 5
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """Where a prompt stands, and its tokens."""

    place: str
    tokens: Tokens


@dataclass(frozen=True)
class Continuation:
    """A prompt, what both models make of it, and for how many tokens they agree; None for what was not generated."""

    place: str
    prompt: str
    agreed: int
    reference: str
    candidate: str | None


@dataclass(frozen=True)
class Generation:
    """Agreement over all prompts, of at most `tokens` each; `whole` counts those that agree to the end."""

    prompts: int
    tokens: int
    agreement_mean: float
    agreement_median: float
    whole: int
    worst: tuple[Continuation, ...]


def prompts_of(
    entries: Iterable[Entry], tokenizer: Tokenizer, generate_tokens: int, context: int | None, origin: str
) -> tuple[Prompt, ...]:
    """Chats up to the answer that is to come, or pieces of running text as servers read them; of a .txt its lines.

    Raises InputError for a prompt that leaves no room in the model's context.
    """
    found = [_prompt(entry, tokenizer, origin) for given in entries for entry in _lines_of(given)]
    if not found:
        raise InputError(f"{origin}: holds no prompt", "give chats, or pieces of running text")
    for prompt in found:
        if context is not None and len(prompt.tokens) + generate_tokens > context:
            raise InputError(
                f"{origin}: {prompt.place}: {len(prompt.tokens)} tokens and {generate_tokens} to generate, "
                f"the model's context is {context}",
                "shorten the prompt, or set drift.generate_tokens lower",
            )
    return tuple(found)


def generate(session: Session, prompts: Sequence[Prompt], count: int, progress: Progress) -> tuple[Tokens, ...]:
    """What the reference writes after each prompt."""
    if not isinstance(session, GreedySession):
        raise UsageError("the reference's runtime cannot generate", "leave drift.prompts out")
    found = []
    for number, prompt in enumerate(prompts):
        found.append(tuple(session.greedy(prompt.tokens, count, session.ends)))
        progress(number + 1, len(prompts))
    return tuple(found)


def agreements(
    session: Session, prompts: Sequence[Prompt], written: Sequence[Tokens], progress: Progress
) -> NDArray[np.int64]:
    """For how many of the tokens that the reference wrote a candidate would write the same, [prompts]."""
    windows = [
        Window((*prompt.tokens, *tokens), tuple(range(len(prompt.tokens), len(prompt.tokens) + len(tokens))), "", 0)
        for prompt, tokens in zip(prompts, written, strict=True)
    ]
    found = np.empty(len(windows), np.int64)
    for number, rows in enumerate(batched_rows(session, windows)):
        differs = rows.argmax(axis=1) != written[number]
        found[number] = int(differs.argmax()) if differs.any() else len(differs)
        progress(number + 1, len(windows))
    return found


def compare_generation(
    session: Session,
    prompts: Sequence[Prompt],
    written: Sequence[Tokens],
    count: int,
    decode: Decode,
    progress: Progress,
) -> Generation:
    """A candidate against what the reference wrote, with the prompts that it leaves first."""
    agreed = agreements(session, prompts, written, progress)
    parted = [number for number in np.argsort(agreed, kind="stable") if agreed[number] < len(written[number])]

    def shown(number: int) -> Continuation:
        prompt = prompts[number]
        text = None
        if isinstance(session, GreedySession):
            text = decode(session.greedy(prompt.tokens, count, session.ends))
        return Continuation(prompt.place, decode(prompt.tokens), int(agreed[number]), decode(written[number]), text)

    return Generation(
        prompts=len(prompts),
        tokens=count,
        agreement_mean=fmean(agreed.tolist()),
        agreement_median=float(median(agreed.tolist())),
        whole=len(prompts) - len(parted),
        worst=tuple(shown(number) for number in parted[:SHOWN]),
    )


def _lines_of(entry: Entry) -> list[Entry]:
    """The lines of a file that is one piece of running text, that are not empty."""
    if not entry.is_file:
        return [entry]
    lines = enumerate(entry.text.split("\n"), 1)
    return [Entry(line, f"line {number}") for number, line in lines if line.strip()]


def _prompt(entry: Entry, tokenizer: Tokenizer, origin: str) -> Prompt:
    if entry.chat:
        asked = max((turn for turn, item in enumerate(entry.chat, 1) if item["role"] != "assistant"), default=0)
        if asked == 0:
            raise InputError(f"{origin}: {entry.place}: only the assistant speaks", "end each chat with a question")
        return Prompt(entry.place, tuple(tokenizer.encode(tokenizer.render(entry.chat[:asked], answering=True))))
    tokens = tuple(tokenizer.encode_whole(entry.text))
    if not tokens:
        raise InputError(f"{origin}: {entry.place}: an empty prompt", "leave it out")
    return Prompt(entry.place, tokens)
