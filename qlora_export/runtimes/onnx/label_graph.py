"""A sequence classifier's graph, run on some texts at once. Imports ONNX Runtime and numpy alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qlora_export.runtimes.onnx.cached_graph import LOGITS, Rows


class LabelGraph:
    """An open session of ONNX Runtime; texts of unequal lengths are padded on the right with this token."""

    def __init__(self, session: Any, padding: int) -> None:
        self._session = session
        self._padding = padding

    def rows(self, windows: Sequence[Sequence[int]], decoded: int, output: str = LOGITS) -> list[Rows]:
        """The logits [1, labels] of each text, or an inner output [tokens, width]; nothing is decoded."""
        del decoded
        lengths = np.array([len(window) for window in windows])
        own = np.arange(lengths.max()) < lengths[:, None]
        tokens = np.full(own.shape, self._padding, np.int64)
        tokens[own] = np.concatenate(windows)
        (found,) = self._session.run([output], {"input_ids": tokens, "attention_mask": own.astype(np.int64)})
        if output == LOGITS:
            return [row[None].astype(np.float32) for row in found]
        return [row[mask].astype(np.float32) for row, mask in zip(found.reshape(*own.shape, -1), own, strict=True)]
