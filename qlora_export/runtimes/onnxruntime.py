"""The runtime `onnxruntime`: the KV-cache graph on the CPU, in a process of its own.

The last tokens of a window are decoded one at a time with the cache, the others prefilled at once, so the numbers speak
for both ways of running. A crash of the native library ends the worker and is reported as an error.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from qlora_export.contracts import Float32, Session
from qlora_export.errors import EnvironmentProblem, InputError

WORKER = "qlora_export.runtimes.onnxruntime_worker"


class OnnxRuntime:
    """Opens ONNX folders with a `genai_config.json`."""

    name = "onnxruntime"

    @contextmanager
    def open(self, folder: Path) -> Iterator[Session]:
        """Start a worker on the folder; raises InputError when the graph does not load."""
        if find_spec("onnxruntime") is None:
            raise EnvironmentProblem("onnxruntime is not installed", "pip install 'qlora-export[onnx]'")
        words = [sys.executable, "-m", WORKER, str(folder)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                yield WorkerSession(folder, process)
            finally:
                process.kill()


class WorkerSession:
    """Talks to a worker: a JSON line with tokens in, two little-endian int64 sizes and float32 rows out."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self._folder = folder
        self._process = process

    def log_probabilities(self, tokens: Sequence[int]) -> Float32:
        """Log-probabilities [tokens, vocabulary] of the token that follows each position, in nats."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(list(tokens)).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        head = stdout.read(16)
        if len(head) < 16:
            raise self._failure()
        rows, columns = struct.unpack("<qq", head)
        raw = stdout.read(4 * rows * columns)
        if len(raw) < 4 * rows * columns:
            raise self._failure()
        return np.frombuffer(raw, np.float32).reshape(rows, columns)

    def _failure(self) -> InputError:
        stderr = self._process.stderr.read().decode(errors="replace") if self._process.stderr else ""
        last = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "no message")
        code = self._process.wait()
        return InputError(f"{self._folder}: ONNX Runtime ended with status {code}: {last}", "export the folder again")
