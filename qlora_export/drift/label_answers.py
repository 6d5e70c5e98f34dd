"""What a classifier predicts of the texts that it was measured on, beside what its reference predicts: which flip."""

from __future__ import annotations

import numpy as np

from qlora_export.drift.multiple_choice import Answered, Choices, Flip, compare_answers
from qlora_export.drift.results import Measurement
from qlora_export.drift.tokens import TokenSet
from qlora_export.drift.worst_tokens import Decode

START_TOKENS = 64


def compare_labels(candidate: Measurement, reference: Measurement, tokens: TokenSet, decode: Decode) -> Choices | None:
    """Accuracy of both and the texts that they label differently; None for a language model."""
    if not tokens.labels:
        return None
    answers = zip(tokens.windows, _predicted(reference), _predicted(candidate), strict=True)
    answered = [Answered(window.tokens[-1], first, second) for window, first, second in answers]

    def flip(number: int) -> Flip:
        window, item = tokens.windows[number], answered[number]
        chosen = (item.right, item.reference, item.candidate)
        names = ["" if label is None else tokens.labels[label] for label in chosen]
        return Flip(window.place, decode(window.fed[:START_TOKENS]), *names)

    return compare_answers(answered, flip)


def _predicted(measured: Measurement) -> list[int | None]:
    """The predicted labels; None where the model gave no number."""
    known = np.isfinite(measured.confidence)
    return [int(label) if there else None for label, there in zip(measured.top1, known, strict=True)]
