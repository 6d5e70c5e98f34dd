"""Whether a candidate's tokenizer is the reference's: if not, both would be asked about different texts.

Compared are the vocabularies, what a server puts before a text, every chat as the template renders it, and the ids of
the whole text. A candidate with sound weights and another tokenizer is broken for its users all the same, so this is no
warning: nothing is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

from qlora_export.errors import InputError
from qlora_export.sources.text import DriftText
from qlora_export.sources.tokenizer import ServedTokenizer

SHOWN_TOKENS = 5
SHOWN_CHARACTERS = 40
PROBE = "a"


def require_same_tokenizer(name: str, candidate: ServedTokenizer, reference: ServedTokenizer, text: DriftText) -> None:
    """Raise InputError naming every kind of difference, and which tokens differ."""
    if found := list(differences(candidate, reference, text)):
        raise InputError(
            f"{name}: its tokenizer is not the reference's: {'; '.join(found)}",
            "put the reference's tokenizer files and chat template into the folder",
        )


def differences(candidate: ServedTokenizer, reference: ServedTokenizer, text: DriftText) -> Iterator[str]:
    """What differs, in words, one sentence a kind."""
    found = (
        _vocabulary_difference(candidate.vocabulary(), reference.vocabulary()),
        _served_difference(candidate, reference),
        _template_difference(candidate, reference, text),
        _encoding_difference(candidate, reference, text),
    )
    return (said for said in found if said is not None)


def _vocabulary_difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str | None:
    tokens = sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
    if not tokens:
        return None
    shown = [f"{token!r} is {ours.get(token, 'missing')}, not {theirs.get(token, 'there')}" for token in tokens]
    rest = f" and {len(tokens) - SHOWN_TOKENS} more" if len(tokens) > SHOWN_TOKENS else ""
    return f"{len(tokens)} tokens differ: {', '.join(shown[:SHOWN_TOKENS])}{rest}"


def _served_difference(candidate: ServedTokenizer, reference: ServedTokenizer) -> str | None:
    ours, theirs = candidate.served(PROBE), reference.served(PROBE)
    if ours == theirs:
        return None
    return f"a text of {PROBE!r} is served as {candidate.decode(ours)!r}, not {reference.decode(theirs)!r}"


def _template_difference(candidate: ServedTokenizer, reference: ServedTokenizer, text: DriftText) -> str | None:
    for entry in text.entries:
        if isinstance(entry.content, str):
            continue
        for answering in (False, True):
            ours, theirs = (tokenizer.render(entry.content, answering) for tokenizer in (candidate, reference))
            if (at := _first_difference(ours, theirs)) is not None:
                shown = f"{ours[at : at + SHOWN_CHARACTERS]!r}, not {theirs[at : at + SHOWN_CHARACTERS]!r}"
                return f"the template renders {entry.place} otherwise from character {at} on: {shown}"
    return None


def _encoding_difference(candidate: ServedTokenizer, reference: ServedTokenizer, text: DriftText) -> str | None:
    for entry in text.entries:
        content = entry.content
        piece = content if isinstance(content, str) else reference.render(content, answering=False)
        ours, theirs = candidate.encode(piece), reference.encode(piece)
        if (at := _first_difference(ours, theirs)) is not None:
            shown = f"{candidate.decode(ours[at : at + 1])!r}, not {reference.decode(theirs[at : at + 1])!r}"
            return f"token {at} of {entry.place} is {shown}"
    return None


def _first_difference(ours: Sequence[object], theirs: Sequence[object]) -> int | None:
    if ours == theirs:
        return None
    return next(at for at, (one, other) in enumerate(zip_longest(ours, theirs)) if one != other)
