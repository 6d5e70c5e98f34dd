"""A process that ONNX Runtime runs in, so that a crash of the native library is an error and no more.

Asked with a JSON line; answers with arrays, each as rows and columns in little-endian int64 and its values in float32.
"""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np

from qlora_export.errors import EnvironmentProblem, ExportError, InputError
from qlora_export.types import Float32


class Worker:
    """Talks to such a process."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes], messages: IO[bytes]) -> None:
        self._folder = folder
        self._messages = messages
        self.process = process

    def ask(self, request: Any, count: int) -> list[Float32]:
        """So many arrays in answer; raises InputError when the process ended, EnvironmentProblem when it was killed."""
        stdin = self.process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return [self._array() for _ in range(count)]

    def _array(self) -> Float32:
        rows, columns = struct.unpack("<qq", self._bytes(16))
        return np.frombuffer(self._bytes(4 * rows * columns), np.float32).reshape(rows, columns)

    def _bytes(self, count: int) -> bytes:
        stdout = self.process.stdout
        assert stdout is not None
        raw = stdout.read(count)
        if len(raw) < count:
            raise self._failure()
        return raw

    def _failure(self) -> ExportError:
        code = self.process.wait()
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        if code == -signal.SIGKILL:
            return EnvironmentProblem(
                f"{self._folder}: ONNX Runtime was killed", "most often for want of memory; run again with more"
            )
        return InputError(f"{self._folder}: ONNX Runtime ended with status {code}: {last}", "export the folder again")


@contextmanager
def running(module: str, folder: Path) -> Iterator[Worker]:
    """A module of ours as a process of its own, told the folder, for as long as it is asked."""
    if find_spec("onnxruntime") is None:
        raise EnvironmentProblem("onnxruntime is not installed", "pip install 'qlora-export[onnx]'")
    words = [sys.executable, "-P", "-m", module, str(folder)]
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages)
        try:
            yield Worker(folder, process, messages)
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    stream.close() if stream else None
