"""The command in this process, where what it says and its exit code are asked, and not how a process ends."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import typer

from qlora_export.cli import main
from tests.processes import Finished


@functools.cache
def command() -> Any:
    """What typer makes of the verbs and their flags; it would do so for each call."""
    return typer.main.get_command(main.app)


def inside(*words: Any, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Finished:
    """What a process would say, and its exit code."""
    said = [str(word) for word in words]
    with (
        contextlib.redirect_stdout(io.StringIO()) as output,
        contextlib.redirect_stderr(io.StringIO()) as complaints,
        contextlib.chdir(cwd or Path.cwd()),
        mock.patch.dict(os.environ, os.environ if env is None else env, clear=True),
        mock.patch.object(sys, "argv", ["qlora-export", *said]),
        mock.patch.object(main, "app", command()),
    ):
        code = main._run()
    return Finished(said, code, output.getvalue(), complaints.getvalue())
