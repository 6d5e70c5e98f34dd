"""Windows of token ids out of running text, and the digest that says which tokens they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


def text_windows(ids: Sequence[int], begin: int | None, window_tokens: int) -> Iterator[tuple[int, ...]]:
    """Disjoint windows of at most `window_tokens`, each after the begin token where there is one; all ids are kept."""
    lead = () if begin is None else (begin,)
    step = window_tokens - len(lead)
    for start in range(0, len(ids), step):
        yield (*lead, *ids[start : start + step])


def digest_of_tokens(rows: Iterable[Sequence[int]]) -> str:
    """sha256 over rows of numbers, as little-endian int32 with the length of each row before it."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.array([len(row), *row], "<i4").tobytes())
    return digest.hexdigest()
