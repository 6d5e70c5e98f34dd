"""A decoder graph with a key-value cache, run on some windows at once. Imports ONNX Runtime and numpy alone.

Windows of unequal lengths are padded on the right: the graph's attention counts the tokens of a row and takes that many
from its left, so that padding on the left would be read as text (tried: logits off by 4). Each row then decodes its own
next token, whose cache entry takes the place of the first padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOGITS = "logits"
TOKENS_AND_MASK = ("input_ids", "attention_mask")
POSITIONS = "position_ids"
PAST, PRESENT = "past_key_values.", "present."
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
Rows = NDArray[np.float32]


class CachedGraph:
    """An open session of ONNX Runtime, whose caches have so many heads of this size."""

    def __init__(self, session: Any, decoder: Mapping[str, Any]) -> None:
        self._session = session
        inputs = {item.name: item.type for item in session.get_inputs()}
        self._pasts = {name: DTYPES[kind] for name, kind in inputs.items() if name.startswith(PAST)}
        self._has_positions = POSITIONS in inputs
        self._heads, self._head_size = int(decoder["num_key_value_heads"]), int(decoder["head_size"])

    def rows(self, windows: Sequence[Sequence[int]], decoded: int, output: str = LOGITS) -> list[Rows]:
        """An output [tokens, width] for each window: the last tokens decoded one at a time, the others at once."""
        decoded = min(decoded, *(len(window) - 1 for window in windows))
        lengths = [len(window) - decoded for window in windows]
        shape = (len(windows), self._heads, 0, self._head_size)
        cache: dict[str, Any] = {name: np.zeros(shape, kind) for name, kind in self._pasts.items()}
        found, cache = self._prefilled(windows, lengths, cache, output)
        parts = [[row[:length]] for row, length in zip(found, lengths, strict=True)]
        for step in range(decoded):
            totals = np.array(lengths) + step + 1
            tokens = [[window[total - 1]] for window, total in zip(windows, totals, strict=True)]
            found, cache = self._run(tokens, totals, totals[:, None] - 1, cache, output)
            for part, row in zip(parts, found, strict=True):
                part.append(row)
        return [np.concatenate(part).astype(np.float32) for part in parts]

    def _prefilled(
        self, windows: Sequence[Sequence[int]], lengths: Sequence[int], cache: dict[str, Any], output: str
    ) -> tuple[Any, dict[str, Any]]:
        longest = max(lengths)
        tokens = [
            [*window[:length], *[0] * (longest - length)] for window, length in zip(windows, lengths, strict=True)
        ]
        positions = np.minimum(np.arange(longest), np.array(lengths)[:, None] - 1)
        return self._run(tokens, np.array(lengths), positions, cache, output)

    def _run(
        self, tokens: list[list[int]], totals: NDArray[Any], positions: NDArray[Any], cache: dict[str, Any], output: str
    ) -> tuple[Any, dict[str, Any]]:
        """An output [windows, tokens, width] and the cache with these tokens; `totals` count those of each row."""
        mask = np.arange(totals.max()) < totals[:, None]
        inputs = {"input_ids": np.array(tokens, np.int64), "attention_mask": mask.astype(np.int64), **cache}
        if self._has_positions:
            inputs[POSITIONS] = positions.astype(np.int64)
        names = [output, *(PRESENT + name.removeprefix(PAST) for name in cache)]
        found, *presents = self._session.run(names, inputs)
        return found.reshape(*np.shape(tokens), -1), dict(zip(cache, presents, strict=True))


def log_softmax(logits: Rows) -> Rows:
    """Log-probabilities in nats, row by row."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Rows = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
