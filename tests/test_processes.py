"""A forked process is what a fresh interpreter is, for all that a test of a command can see."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Forked, Warm, forked, fresh

SCRIPTS = {
    "says": "import sys; print(sys.argv); print('mind', file=sys.stderr)",
    "place and environment": "import os; print(os.getcwd(), sorted(os.environ.items()))",
    "sees a change of the environment": "import subprocess; print(subprocess.check_output(['printenv', 'WORD']))",
    "a code": "raise SystemExit(11)",
    "a message": "raise SystemExit('no more')",
    "nothing of ours is imported": "import sys; print([name for name in sys.modules if name.startswith('qlora')])",
    "is the main module": "print(__name__, __import__('__main__').__dict__ is globals())",
    "is not watched": "import sys; print(sys.stdin.read(), sys.stdout.isatty())",
    "at the end": "import atexit; atexit.register(print, 'bye')",
    "a thread at the end": "import threading; threading.Timer(0.1, print, ['late']).start()",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "holds no file": "import os; print(len(os.listdir('/proc/self/fd')), len(os.listdir('/proc/self/task')))",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_forked_process_is_like_a_fresh_one(name: str, tmp_path: Path) -> None:
    found, expected = (
        run("-c", SCRIPTS[name], "a word", tmp_path, cwd=tmp_path, env={**os.environ, "WORD": "here"})
        for run in (forked, fresh)
    )
    assert found.returncode == expected.returncode
    assert (found.stdout, found.stderr) == (expected.stdout, expected.stderr)


def test_an_error_is_told_and_a_failure() -> None:
    found = forked("-c", "1 / 0")
    assert found.returncode == 1
    assert found.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_module_runs_as_the_command() -> None:
    for words in (["--version"], ["paln"], ["explain", "7", "--json"]):
        found, expected = (run("-m", "qlora_export", *words) for run in (forked, fresh))
        assert (found.returncode, found.stdout, found.stderr) == (
            expected.returncode,
            expected.stdout,
            expected.stderr,
        )


@pytest.fixture(params=["fresh", "forked"])
def start(request: pytest.FixtureRequest) -> Callable[..., subprocess.Popen[bytes]]:
    kind: Any = {"fresh": subprocess.Popen, "forked": Forked}[request.param]
    return lambda script, *words, **options: kind([sys.executable, "-P", "-c", script, *words], **options)


def test_it_is_waited_for_and_ended_as_any_process(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    with start("import time; time.sleep(60)", stdin=subprocess.DEVNULL) as process:
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
        process.terminate()
        assert process.wait() == -signal.SIGTERM
        assert process.poll() == -signal.SIGTERM


def test_it_is_talked_with(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    script = "import sys; print(sys.stdin.readline().upper(), file=sys.stderr)"
    with start(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.communicate(b"word\n")[0] == b"WORD\n\n"
    assert process.returncode == 0


@pytest.mark.parametrize("close", [True, False])
def test_it_inherits_the_files_that_any_process_does(
    start: Callable[..., subprocess.Popen[bytes]], close: bool
) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    with start(f"import os; os.write({writing}, b'here')", close_fds=close, stderr=subprocess.PIPE) as process:
        assert (process.wait() == 0) == (not close)
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        assert told.read() == (b"" if close else b"here")


def test_what_python_imports_by_itself(start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import own; own.word = 'set'")
    (tmp_path / "own.py").write_text("word = ''")
    options = {"env": {**os.environ, "PYTHONPATH": str(tmp_path)}, "stdout": subprocess.PIPE}
    with start("import own; print(own.word)", **options) as process:
        assert process.communicate()[0] == b"set\n"


def test_the_products_own_processes_are_forked_here() -> None:
    assert issubclass(subprocess.Popen, Warm)
    with subprocess.Popen([sys.executable, "-P", "-m", "qlora_export.runtimes.nowhere"], stderr=subprocess.PIPE) as own:
        assert isinstance(own, Warm)
        assert own.connection is not None
        assert b"No module named qlora_export.runtimes.nowhere" in own.communicate()[1]


def test_one_that_takes_too_long_is_killed() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        forked("-c", "import time; time.sleep(60)", timeout=0.5)
