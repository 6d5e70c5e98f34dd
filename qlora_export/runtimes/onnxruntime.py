"""The runtime `onnxruntime`: the KV-cache graph on the CPU, in a process of its own.

The last tokens of a window are decoded one at a time with the cache, the others prefilled at once, so the numbers speak
for both ways of running. The folder is looked at before anything opens it (`onnx/folder.py`); a crash of the native
library ends the worker and is reported as an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qlora_export.runtimes.base import Session
from qlora_export.runtimes.onnx.folder import open_graph
from qlora_export.runtimes.onnx.process import Worker, running
from qlora_export.types import Float32

WORKER = "qlora_export.runtimes.onnxruntime_worker"


class OnnxRuntime:
    """Opens ONNX folders with a `genai_config.json`, or of a sequence classifier with a `config.json`."""

    name = "onnxruntime"

    @contextmanager
    def open(self, folder: Path, device: str = "cpu") -> Iterator[Session]:
        """Start a worker on the folder; raises InputError when the graph does not load. It computes on the CPU.

        Raises Refused, before it starts, where graph or data lie outside of the folder.
        """
        del device
        open_graph(folder)
        with running(WORKER, folder) as worker:
            yield WorkerSession(worker)


class WorkerSession:
    """Windows one after the other."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def log_probabilities(self, tokens: Sequence[int]) -> Float32:
        """Log-probabilities [tokens, vocabulary] of the token that follows each position, or [1, labels], in nats."""
        return self.worker.ask(list(tokens), 1)[0]
