"""Whether the text of calibration and the text of drift have anything in common: a gate on what was fitted is none.

Two chats are the same when a whole conversation is, or a longer exchange of a question and its answer. In every other
pair of texts it is a paragraph or message of the one that stands in the other, or 40 words in a row, unless they stand
in three or more entries of the drift text: those are a form that all share. Case and white space do not count, nor do
system messages. The whole texts are compared, drawn or not, so the answer does not hang on the seed.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from qlora_export.engine.calibration.passages import Passage, Runs, passages_of, runs_of, said, words_of
from qlora_export.engine.calibration.text import CalibrationText
from qlora_export.errors import Refused
from qlora_export.sources.text_entries import Entry

# Shorter exchanges and paragraphs are said by many: "Hello", "How can I help you?".
EXCHANGE_WORDS = 8
PARAGRAPH_WORDS = 12
# What stands in so many entries of the drift text is a form.
FORM_ENTRIES = 3
SHOWN_WORDS = 10


@dataclass(frozen=True)
class Contamination:
    """What one calibration text shares with the drift text: how many, and the first with its place in both."""

    name: str
    kind: str
    shared: int
    count: int
    place: str
    drift_place: str
    text: str

    def sentence(self, drift_name: str) -> str:
        """The finding in words."""
        words = self.text.split()
        start = " ".join(words[:SHOWN_WORDS]) + (" ..." if len(words) > SHOWN_WORDS else "")
        return (
            f"{self.shared} of {self.count} {self.kind} of {self.name} stand in {drift_name} too, "
            f"the first at {self.place} ({self.drift_place} there): {start!r}"
        )


def require_apart(texts: Sequence[CalibrationText], drift: Sequence[Entry], drift_name: str) -> None:
    """Raise Refused where a calibration text overlaps the drift text, naming how many and the first of each.

    Both texts are sound by themselves, so this is no mistake of the recipe: to go on would be unsafe, since the gate
    would pass what it should not.
    """
    found = [overlap for overlap in (contamination_of(text, drift) for text in texts) if overlap is not None]
    if found:
        raise Refused(
            "calibration on the text that drift is measured on: "
            + "; ".join(one.sentence(drift_name) for one in found),
            "leave these out of one of the two, or calibrate on another split",
        )


def contamination_of(text: CalibrationText, drift: Sequence[Entry]) -> Contamination | None:
    """What a calibration text has in common with the drift text."""
    both_are_chats = not any(isinstance(entry.content, str) for entry in (*text.entries, *drift))
    return _same_chats(text, drift) if both_are_chats else _same_passages(text, drift)


def _same_chats(text: CalibrationText, drift: Sequence[Entry]) -> Contamination | None:
    places: dict[tuple[str, ...], str] = {}
    for entry in drift:
        for key in _chat_keys(entry):
            places.setdefault(key, entry.place)
    shared = [(entry, key) for entry in text.entries for key in _chat_keys(entry) if key in places]
    if not shared:
        return None
    first, key = shared[0]
    count = len({id(entry) for entry, _ in shared})
    return Contamination(text.name, "chats", count, len(text.entries), first.place, places[key], _start(first))


def _chat_keys(entry: Entry) -> Iterator[tuple[str, ...]]:
    """What a conversation is known by: itself, and each longer exchange."""
    messages = said(entry.content) if not isinstance(entry.content, str) else ()
    turns = [(message["role"], _plain(message["content"])) for message in messages]
    if any(content for _, content in turns):
        yield tuple(word for turn in turns for word in turn)
    for (_, question), (role, answer) in pairwise(turns):
        if role == "assistant" and len(words_of(question)) + len(words_of(answer)) >= EXCHANGE_WORDS:
            yield (question, answer)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _start(entry: Entry) -> str:
    return entry.content if isinstance(entry.content, str) else said(entry.content)[0]["content"]


def _same_passages(text: CalibrationText, drift: Sequence[Entry]) -> Contamination | None:
    ours, theirs = passages_of(text.entries), passages_of(drift)
    found = {
        **_shared_runs(_runs(text.entries, ours), _runs(drift, theirs), theirs),
        **_shared_paragraphs(ours, theirs),
    }
    if not found:
        return None
    first = min(found)
    kind = "paragraphs" if isinstance(text.entries[0].content, str) else "messages"
    passage = ours[first]
    return Contamination(text.name, kind, len(found), len(ours), passage.place, found[first].place, passage.text)


def _runs(entries: Sequence[Entry], passages: Sequence[Passage]) -> Runs:
    return runs_of(passages, across=any(isinstance(entry.content, str) for entry in entries))


def _shared_runs(ours: Runs, theirs: Runs, passages: Sequence[Passage]) -> dict[int, Passage]:
    """Our passages in which a shared run begins, each with the passage of theirs."""
    entries = np.array([passage.entry for passage in passages], np.int64)[theirs.passages]
    # Sorted by number, entries ascending among equal ones: a pair that differs from the one before is a new entry.
    order = np.argsort(theirs.numbers, kind="stable")
    numbers, begins = np.unique(theirs.numbers[order], return_index=True)
    anew = np.diff(entries[order], prepend=-1) != 0
    anew[begins] = True
    rare = np.add.reduceat(anew, begins) < FORM_ENTRIES
    if not rare.any():
        return {}
    numbers, first = numbers[rare], order[begins[rare]]
    at = np.minimum(np.searchsorted(numbers, ours.numbers), len(numbers) - 1)
    shared = np.flatnonzero(numbers[at] == ours.numbers)
    found: dict[int, Passage] = {}
    for our_passage, their_passage in zip(ours.passages[shared], theirs.passages[first[at[shared]]], strict=True):
        found.setdefault(int(our_passage), passages[their_passage])
    return found


def _shared_paragraphs(ours: Sequence[Passage], theirs: Sequence[Passage]) -> dict[int, Passage]:
    """Our passages that are one of theirs as a whole."""
    known = {passage.words: passage for passage in reversed(theirs) if len(passage.words) >= PARAGRAPH_WORDS}
    standing_in = Counter(words for words, _ in {(passage.words, passage.entry) for passage in theirs})
    return {
        number: known[passage.words]
        for number, passage in enumerate(ours)
        if passage.words in known and standing_in[passage.words] < FORM_ENTRIES
    }
