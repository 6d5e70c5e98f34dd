"""Texts with labels as windows: what a classifier reads of a text, and the number of its label as the scored token.

A model gives one row for a text, its log-probabilities over the labels, so everything that compares rows compares what
it says of labels: NLL is the cross-entropy of the right one, top-1 the predicted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from qlora_export.drift.tokens import Protocol, TokenSet, Window
from qlora_export.drift.window_sizes import SizedProtocol
from qlora_export.errors import InputError, UsageError
from qlora_export.sources.text import DriftText
from qlora_export.sources.text_entries import Entry
from qlora_export.sources.tokenizer import Tokenizer

HINT = 'give lines {"text": ..., "label": ...}, the label by its number from 0 or by its name'
SHOWN_LABELS = 10


def require_labels(text: DriftText, labels: Sequence[str]) -> None:
    """Raise UsageError for chats, InputError naming file and line for a text without one of these labels."""
    if text.chats:
        raise UsageError(f"{text.origin}: a classifier is measured on texts with labels, and these are chats", HINT)
    for entry in text.entries:
        _number(entry, text.origin, labels)


def labelled_tokens(text: DriftText, tokenizer: Tokenizer, protocol: SizedProtocol, limit: int | None) -> TokenSet:
    """A window for each text, the first `limit` of them; raises InputError for one that is empty or has no label."""
    size, cut = protocol.window_tokens, 0
    windows = []
    for block, entry in islice(enumerate(text.entries), limit):
        label = _number(entry, text.origin, protocol.labels)
        ids, whole = tokenizer.encode_within(entry.text, entry.pair, size)
        if not ids:
            raise InputError(f"{text.origin}: {entry.place} has no token to read", "leave the line out")
        cut += not whole
        windows.append(Window((*ids, label), (len(ids),), entry.place, block, labelled=True))
    reached = f"{cut} of {len(windows)} cut" if cut else "none cut"
    read = f"every text for itself as the tokenizer encodes it, at most {size} tokens ({reached})"
    rules = Protocol(protocol.name, f"{read}, its label scored", size, begin="as the tokenizer adds it")
    return TokenSet(tuple(windows), rules, labels=protocol.labels)


def _number(entry: Entry, origin: str, labels: Sequence[str]) -> int:
    """The number of a text's label; a name that is a number's digits is that number, where no label is called so."""
    place, stated = f"{origin}: {entry.place}", entry.label
    if stated is None:
        raise InputError(f"{place} has no label that is a number or a name", HINT)
    if isinstance(stated, str) and stated in labels:
        return labels.index(stated)
    number = int(stated) if isinstance(stated, int) or stated.isdecimal() else -1
    if not 0 <= number < len(labels):
        shown = ", ".join(f"{place} {name}" for place, name in enumerate(labels[:SHOWN_LABELS]))
        more = f" and {len(labels) - SHOWN_LABELS} more" if len(labels) > SHOWN_LABELS else ""
        raise InputError(f"{place} has label {stated!r}, which the model does not know", f"its labels: {shown}{more}")
    return number
