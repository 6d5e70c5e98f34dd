"""The process behind the runtime `onnxruntime`: `python -m qlora_export.runtimes.onnxruntime_worker FOLDER`.

Reads a JSON list of token ids a line; answers with rows and columns as little-endian int64 and the log-probabilities as
float32. Imports ONNX Runtime and numpy alone.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

DECODED_TOKENS = 8
LOG_ERRORS_ONLY = 3


class CachedGraph:
    """A decoder graph with a key-value cache, as the GenAI model builder makes it."""

    def __init__(self, folder: Path) -> None:
        decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = LOG_ERRORS_ONLY
        self._session = onnxruntime.InferenceSession(
            str(folder / decoder["filename"]), options, providers=["CPUExecutionProvider"]
        )
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._pasts = {i.name: i.type for i in self._session.get_inputs() if i.name.startswith("past_key_values")}
        self._shape = (1, int(decoder["num_key_value_heads"]), 0, int(decoder["head_size"]))

    def log_probabilities(self, tokens: list[int]) -> NDArray[np.float32]:
        """Prefill all but the last few tokens, decode those one by one; [tokens, vocabulary] in nats."""
        cache = {name: np.zeros(self._shape, _dtype(kind)) for name, kind in self._pasts.items()}
        prefill = max(1, len(tokens) - DECODED_TOKENS)
        rows = []
        for start, stop in [(0, prefill), *((at, at + 1) for at in range(prefill, len(tokens)))]:
            logits, cache = self._run(tokens[start:stop], stop, cache)
            rows.append(logits)
        return _log_softmax(np.concatenate(rows).astype(np.float32))

    def _run(self, tokens: list[int], total: int, cache: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        inputs = {"input_ids": np.array([tokens], np.int64), "attention_mask": np.ones((1, total), np.int64)}
        found = dict(zip(self._outputs, self._session.run(None, {**inputs, **cache}), strict=True))
        logits = found.pop("logits")
        return logits[0], {name.replace("present.", "past_key_values."): value for name, value in found.items()}


def _dtype(kind: str) -> type[np.floating[Any]]:
    return np.float16 if kind == "tensor(float16)" else np.float32


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def main() -> None:
    """Answer until stdin ends; stdout is kept for answers, whatever the native library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    graph = CachedGraph(Path(sys.argv[1]))
    for line in sys.stdin:
        found = graph.log_probabilities(json.loads(line))
        answers.write(struct.pack("<qq", *found.shape))
        answers.write(found.tobytes())
        answers.flush()


if __name__ == "__main__":
    main()
