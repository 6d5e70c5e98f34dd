"""A decoder graph with a key-value cache, run on some windows at once. Imports ONNX Runtime and numpy alone.

Windows of unequal lengths are padded on the side that the graph can tell from text. GroupQueryAttention counts the
tokens of a row and takes that many from its left, so that padding on the left would be read as text (tried: logits off
by 4): it goes to the right, and the cache entry of the next token takes the place of the first padding. A traced graph
looks at the mask and lets its cache grow at the right end: padding goes to the left.
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
Numbers = NDArray[np.int64]


class CachedGraph:
    """An open session of ONNX Runtime, whose caches have so many heads of this size; `grows` where padding is left."""

    def __init__(self, session: Any, decoder: Mapping[str, Any], grows: bool = False) -> None:
        self._session = session
        inputs = {item.name: item.type for item in session.get_inputs()}
        self._pasts = {name: DTYPES[kind] for name, kind in inputs.items() if name.startswith(PAST)}
        self._has_positions = POSITIONS in inputs
        self._heads, self._head_size = int(decoder["num_key_value_heads"]), int(decoder["head_size"])
        self._grows = grows

    def rows(self, windows: Sequence[Sequence[int]], decoded: int, output: str = LOGITS) -> list[Rows]:
        """An output [tokens, width] for each window: the last tokens decoded one at a time, the others at once."""
        decoded = min(decoded, *(len(window) - 1 for window in windows))
        lengths = np.array([len(window) - decoded for window in windows])
        paddings = lengths.max() - lengths
        shape = (len(windows), self._heads, 0, self._head_size)
        cache: dict[str, Any] = {name: np.zeros(shape, kind) for name, kind in self._pasts.items()}
        tokens = np.zeros((len(windows), lengths.max()), np.int64)
        own = self._own(lengths, paddings)
        tokens[own] = np.concatenate([window[:length] for window, length in zip(windows, lengths, strict=True)])
        positions = np.cumsum(own, axis=1) - 1
        found, cache = self._run(tokens, own, positions.clip(min=0), cache, output)
        parts = [[row[mask]] for row, mask in zip(found, own, strict=True)]
        for step in range(decoded):
            places = lengths + step
            tokens = np.array([[window[place]] for window, place in zip(windows, places, strict=True)])
            found, cache = self._run(tokens, self._own(places + 1, paddings), places[:, None], cache, output)
            for part, row in zip(parts, found, strict=True):
                part.append(row)
        return [np.concatenate(part).astype(np.float32) for part in parts]

    def _own(self, lengths: Numbers, paddings: Numbers) -> NDArray[np.bool_]:
        """Which tokens [windows, longest] are of the windows, with so much padding beside them."""
        places = np.arange(lengths.max())
        own: NDArray[np.bool_] = places >= paddings[:, None] if self._grows else places < lengths[:, None]
        return own

    def _run(
        self, tokens: Numbers, mask: NDArray[np.bool_], positions: Numbers, cache: dict[str, Any], output: str
    ) -> tuple[Any, dict[str, Any]]:
        """An output [windows, tokens, width] and the cache with these tokens."""
        inputs = {"input_ids": tokens, "attention_mask": mask.astype(np.int64), **cache}
        if self._has_positions:
            inputs[POSITIONS] = positions.astype(np.int64)
        names = [output, *(PRESENT + name.removeprefix(PAST) for name in cache)]
        found, *presents = self._session.run(names, inputs)
        return found.reshape(*tokens.shape, -1), dict(zip(cache, presents, strict=True))


def log_softmax(logits: Rows) -> Rows:
    """Log-probabilities in nats, row by row."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Rows = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
