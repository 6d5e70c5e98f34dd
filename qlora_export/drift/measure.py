"""One model on the token set: per token the NLL, the top-1 token and KL(reference || model).

    KL_t = sum_v p_ref(v) * (ln p_ref(v) - ln p(v)),   summed in float64 over the vocabulary

The reference's log-probabilities [tokens, vocabulary] lie in a float32 scratch file, 4 bytes an entry, so that models
are opened one after the other.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from qlora_export.contracts import Float32, Measurement, Progress, Session
from qlora_export.drift.tokens import TokenSet, Window
from qlora_export.errors import EnvironmentProblem, InputError

ROWS_AT_ONCE = 64


class ReferenceProbabilities:
    """The reference's log-probabilities, written once and read by window."""

    def __init__(self, file: IO[bytes], tokens: TokenSet) -> None:
        self.tokens = tokens
        self._file = file
        counts = [len(window.scored) for window in tokens.windows]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._rows: np.memmap[tuple[int, int], np.dtype[np.float32]] | None = None

    def put(self, number: int, rows: Float32) -> None:
        """Store the rows of a window; raises EnvironmentProblem when the disk has no room for all of them."""
        if self._rows is None:
            shape = (int(self._starts[-1]), rows.shape[1])
            try:
                os.posix_fallocate(self._file.fileno(), 0, 4 * shape[0] * shape[1])
            except OSError as error:
                message = f"no room for {4 * shape[0] * shape[1]} bytes of reference probabilities ({error.strerror})"
                raise EnvironmentProblem(message, "free some disk space, or set drift.tokens lower") from None
            self._rows = np.memmap(self._file, np.float32, "r+", shape=shape)
        self._rows[self._starts[number] : self._starts[number + 1]] = rows

    def get(self, number: int) -> Float32:
        """The rows of a window."""
        if self._rows is None:
            raise InputError("no reference was measured")
        return self._rows[self._starts[number] : self._starts[number + 1]]


@contextmanager
def reference_probabilities(folder: Path, tokens: TokenSet) -> Iterator[ReferenceProbabilities]:
    """Scratch space for the reference, a file without a name beside the artifacts: gone however the process ends."""
    with tempfile.TemporaryFile(dir=folder) as file:
        yield ReferenceProbabilities(file, tokens)


def keep_reference(session: Session, store: ReferenceProbabilities, progress: Progress) -> None:
    """Run the reference and keep its distributions."""
    for number, window in enumerate(store.tokens.windows):
        store.put(number, _scored_rows(session, window))
        progress(number + 1, len(store.tokens.windows))


def measure_reference(name: str, store: ReferenceProbabilities) -> Measurement:
    """The kept reference as a measurement of its own."""
    rows = (store.get(number) for number in range(len(store.tokens.windows)))
    return _compare(name, "transformers", store, rows)


def measure(
    name: str, runtime: str, session: Session, store: ReferenceProbabilities, progress: Progress
) -> Measurement:
    """Measure a model against the kept reference."""

    def rows() -> Iterator[Float32]:
        for number, window in enumerate(store.tokens.windows):
            yield _scored_rows(session, window)
            progress(number + 1, len(store.tokens.windows))

    return _compare(name, runtime, store, rows())


def _scored_rows(session: Session, window: Window) -> Float32:
    """Log-probabilities of the scored tokens' places: row t - 1 predicts token t."""
    rows = session.log_probabilities(window.tokens)
    scored: Float32 = rows[np.array(window.scored) - 1]
    return scored


def _compare(name: str, runtime: str, store: ReferenceProbabilities, found: Iterator[Float32]) -> Measurement:
    nll, top1, kl = [], [], []
    nonfinite = 0
    for number, (window, rows) in enumerate(zip(store.tokens.windows, found, strict=True)):
        reference = store.get(number)
        if rows.shape[1] != reference.shape[1]:
            raise InputError(
                f"{name}: {rows.shape[1]} tokens in the vocabulary, the reference has {reference.shape[1]}",
                "base, adapter and artifact must share one vocabulary",
            )
        nonfinite += int((~np.isfinite(rows).all(axis=1)).sum())
        targets = np.array(window.tokens)[list(window.scored)]
        nll.append(-rows[np.arange(len(targets)), targets].astype(np.float64))
        top1.append(rows.argmax(axis=1))
        kl.append(_divergence(reference, rows))
    return Measurement(name, runtime, np.concatenate(nll), np.concatenate(top1), np.concatenate(kl), nonfinite)


def _divergence(reference: Float32, rows: Float32) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    out = np.empty(len(rows))
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        wide = reference[part].astype(np.float64)
        out[part] = (np.exp(wide) * (wide - rows[part])).sum(axis=1)
    return out
