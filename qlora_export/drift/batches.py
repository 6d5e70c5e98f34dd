"""Windows through a session, several at once where it can: batches of neighbours by a budget of tokens.

Batches are decided by the token set alone, so that two runs of one model add the same numbers in the same order. Where
memory does not suffice, a batch is halved, down to single windows, before the run gives up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qlora_export.drift.tokens import Window
from qlora_export.errors import EnvironmentProblem
from qlora_export.runtimes.base import BatchedSession, Session
from qlora_export.types import Float32

BATCH_TOKENS = 1024


def batches_of(windows: Sequence[Window], batch_tokens: int = BATCH_TOKENS) -> Iterator[list[Window]]:
    """Neighbouring windows that hold, filled up to the longest, at most so many tokens; a longer one stands alone."""
    batch: list[Window] = []
    for window in windows:
        longest = max(len(item.tokens) for item in (*batch, window))
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def batched_rows(session: Session, windows: Sequence[Window]) -> Iterator[Float32]:
    """Log-probabilities [scored, vocabulary] at the scored places of each window, in order."""
    for batch in batches_of(windows) if isinstance(session, BatchedSession) else ([window] for window in windows):
        yield from _rows(session, batch)


def _rows(session: Session, batch: Sequence[Window]) -> list[Float32]:
    try:
        if isinstance(session, BatchedSession):
            return session.rows_at([window.fed for window in batch], [window.rows for window in batch])
        return [session.log_probabilities(window.fed)[list(window.rows)] for window in batch]
    except MemoryError as error:
        if len(batch) == 1:
            raise EnvironmentProblem(
                f"no memory for a window of {len(batch[0].tokens)} tokens: {error}",
                "set drift.window_tokens lower, or run where there is more memory",
            ) from None
    middle = len(batch) // 2
    return [*_rows(session, batch[:middle]), *_rows(session, batch[middle:])]
