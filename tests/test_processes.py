"""A forked process is what a fresh interpreter is, for all that a test of a command can see."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.processes import forked, fresh

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
