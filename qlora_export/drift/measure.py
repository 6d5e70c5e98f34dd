"""One model on the token set: per token the NLL, the top-1 token with its probability, and KL(reference || model).

Windows run in batches of about `BATCH_TOKENS`, the same for every model of a ledger. The reference's log-probabilities
come from the store (`reference_store.py`), so models are opened one after the other. Memory: the logits of a batch, and
some 40 bytes a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from qlora_export.drift.batches import batched_rows
from qlora_export.drift.divergence import divergences
from qlora_export.drift.reference_store import ReferenceProbabilities
from qlora_export.drift.results import Measurement
from qlora_export.drift.tokens import Window, first_windows
from qlora_export.errors import InputError
from qlora_export.runtimes.base import Session
from qlora_export.types import Float32, Progress


def keep_reference(session: Session, store: ReferenceProbabilities, progress: Progress) -> None:
    """Run the reference and keep its distributions; raises InputError where they hold NaN or infinity."""
    windows = store.tokens.windows
    for number, rows in enumerate(batched_rows(session, windows)):
        if not np.isfinite(rows).all():
            raise InputError(
                f"the reference gives NaN or infinity in window {number + 1} of {len(windows)}",
                "there is nothing to compare with: does the model itself work in this dtype?",
            )
        store.put(number, rows)
        progress(number + 1, len(windows))


def measure_reference(name: str, runtime: str, store: ReferenceProbabilities) -> Measurement:
    """The kept reference as a measurement of its own, which does not differ from itself."""
    windows = store.tokens.windows
    parts = [_of_tokens(window, store.get(number)) for number, window in enumerate(windows)]
    nll, top1, confidence = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Measurement(name, runtime, nll, top1, np.zeros(len(nll)), confidence)


def measure(
    name: str,
    runtime: str,
    session: Session,
    store: ReferenceProbabilities,
    progress: Progress,
    at_least: int | None = None,
) -> Measurement:
    """Measure a model against the kept reference; on the first windows with `at_least` so many tokens, or on all."""
    windows = store.tokens.windows if at_least is None else first_windows(store.tokens, at_least).windows

    def rows() -> Iterator[Float32]:
        for number, found in enumerate(batched_rows(session, windows)):
            yield found
            progress(number + 1, len(windows))

    return _compare(name, runtime, store, windows, rows())


def _compare(
    name: str, runtime: str, store: ReferenceProbabilities, windows: Sequence[Window], found: Iterator[Float32]
) -> Measurement:
    """The numbers of the leading windows."""
    parts: list[tuple[np.ndarray[tuple[int], np.dtype[np.generic]], ...]] = []
    nonfinite = 0
    for number, (window, rows) in enumerate(zip(windows, found, strict=True)):
        reference = store.get(number)
        if rows.shape[1] != reference.shape[1]:
            what = "labels" if window.labelled else "tokens in the vocabulary"
            raise InputError(
                f"{name}: {rows.shape[1]} {what}, the reference has {reference.shape[1]}", "both must share them"
            )
        nonfinite += int((~np.isfinite(rows).all(axis=1)).sum())
        parts.append((*_of_tokens(window, rows), divergences(reference, rows)))
    nll, top1, confidence, kl = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Measurement(name, runtime, nll, top1, kl, confidence, nonfinite)


def _of_tokens(window: Window, rows: Float32) -> tuple[np.ndarray[tuple[int], np.dtype[np.generic]], ...]:
    """NLL of the scored tokens, the most likely ones, and the probability of these."""
    every = np.arange(len(rows))
    targets = np.array(window.tokens)[list(window.scored)]
    top1 = rows.argmax(axis=1)
    return -rows[every, targets].astype(np.float64), top1, np.exp(rows[every, top1])
