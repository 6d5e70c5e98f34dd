"""The runtime `onnxruntime`: the KV-cache graph on the CPU, in a process of its own.

The last tokens of a window are decoded one at a time with the cache, the others prefilled at once, so the numbers speak
for both ways of running. A crash of the native library ends the worker and is reported as an error.
"""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import numpy as np

from qlora_export.contracts import Float32, Session
from qlora_export.errors import EnvironmentProblem, ExportError, InputError

WORKER = "qlora_export.runtimes.onnxruntime_worker"


class OnnxRuntime:
    """Opens ONNX folders with a `genai_config.json`."""

    name = "onnxruntime"

    @contextmanager
    def open(self, folder: Path, device: str = "cpu") -> Iterator[Session]:
        """Start a worker on the folder; raises InputError when the graph does not load. It computes on the CPU."""
        del device
        if find_spec("onnxruntime") is None:
            raise EnvironmentProblem("onnxruntime is not installed", "pip install 'qlora-export[onnx]'")
        words = [sys.executable, "-P", "-m", WORKER, str(folder)]
        with tempfile.TemporaryFile() as messages:
            process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages)
            try:
                yield WorkerSession(folder, process, messages)
            finally:
                process.kill()
                process.wait()
                for stream in (process.stdin, process.stdout):
                    with suppress(BrokenPipeError):
                        stream.close() if stream else None


class WorkerSession:
    """Talks to a worker: a JSON line with tokens in, two little-endian int64 sizes and float32 rows out."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes], messages: IO[bytes]) -> None:
        self._folder = folder
        self._process = process
        self._messages = messages

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

    def _failure(self) -> ExportError:
        code = self._process.wait()
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        if code == -signal.SIGKILL:
            return EnvironmentProblem(
                f"{self._folder}: ONNX Runtime was killed", "most often for want of memory; run again with more"
            )
        return InputError(f"{self._folder}: ONNX Runtime ended with status {code}: {last}", "export the folder again")
