"""Running one job in the Hub's child process: environment, progress, deadline, and its errors as ours.

The child is ended when the deadline passes and when this process is told to stop, and ends by itself when this one is
killed. A commit that it was making may land all the same; the next run finds it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from qlora_export.errors import EnvironmentProblem, ExitCode, ExportError, RemoteProblem
from qlora_export.publish.hub.failures import AGAIN
from qlora_export.publish.redaction import redact
from qlora_export.types import Progress

WORKER = "qlora_export.publish.hub.worker"
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}
GRACE_SECONDS = 10


@dataclass(frozen=True)
class Client:
    """How the child is run: what its environment has beside ours, silence allowed to a request, and the deadline.

    `deadline` is a reading of `time.monotonic()`; None is no deadline.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    timeout_seconds: float = 120.0
    deadline: float | None = None

    @property
    def endpoint(self) -> str | None:
        """The Hub's address where it is not the usual one."""
        return self.environment.get("HF_ENDPOINT") or os.environ.get("HF_ENDPOINT") or None


def run_job(client: Client, operation: str, progress: Progress | None = None, **job: Any) -> dict[str, Any]:
    """The answer of the child; raises the error it reports, or RemoteProblem when the deadline passes."""
    data = {"operation": operation, "endpoint": client.endpoint, "timeout_seconds": client.timeout_seconds, **job}
    environment = {**os.environ, **QUIET, **client.environment}
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=environment,
        )
        late = _watch(process, client.deadline)
        try:
            answer = _converse(process, json.dumps(data), progress)
        finally:
            _end(process, late)
        if answer is not None:
            return _result(answer)
        if late.fired:
            raise RemoteProblem("the deadline passed before the Hub had everything", AGAIN)
        if process.returncode < 0:
            raise EnvironmentProblem(
                f"the publisher's process was ended by {signal.Signals(-process.returncode).name}",
                f"was the memory full? {AGAIN}",
            )
        complaints.seek(0)
        told = redact(complaints.read().decode("utf-8", errors="replace"), _secrets(environment))
        raise ExportError(f"the publisher's process ended without an answer:\n{told[-2000:]}", "please report it")


class _Alarm(threading.Timer):
    """Ends a process when the deadline passes, and remembers that it did."""

    fired = False


def _watch(process: subprocess.Popen[bytes], deadline: float | None) -> _Alarm:
    def end() -> None:
        alarm.fired = True
        process.kill()

    alarm = _Alarm(max(0.0, (deadline if deadline is not None else 0.0) - time.monotonic()), end)
    alarm.daemon = True
    if deadline is not None:
        alarm.start()
    return alarm


def _end(process: subprocess.Popen[bytes], alarm: _Alarm) -> None:
    """Leave no child behind, however this one is left."""
    alarm.cancel()
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()


def _converse(process: subprocess.Popen[bytes], job: str, progress: Progress | None) -> dict[str, Any] | None:
    """The last line of the child, None when it left without one."""
    if process.stdin is None or process.stdout is None:
        return None
    try:
        process.stdin.write(job.encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    for line in process.stdout:
        event: dict[str, Any] = json.loads(line)
        if "progress" not in event:
            process.wait()
            return event
        if progress is not None:
            progress(event["progress"][0], event["progress"][1])
    return None


def _result(answer: Mapping[str, Any]) -> dict[str, Any]:
    if (told := answer.get("error")) is not None:
        error = ExportError(told["message"], told["hint"])
        error.exit_code = ExitCode(told["exit_code"])
        raise error
    result: dict[str, Any] = answer["result"]
    return result


def _secrets(environment: Mapping[str, str]) -> list[str]:
    return [environment[name] for name in ("HF_TOKEN", "HF_OIDC_ID_TOKEN") if environment.get(name)]
