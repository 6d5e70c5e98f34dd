"""The tools, each in a process that finds the libraries imported, as do those that it starts."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.processes import ADDRESS, Finished, Forked, forked, fresh, use

TOOLS = Path(__file__).parents[2] / "tools"
# The tool's folder comes first in the path, its name before its words.
SCRIPT = """
import runpy, sys
from tests.tools.running import fork_what_is_started
fork_what_is_started()
name, *words = sys.argv[1:]
sys.path[0] = {folder!r}
sys.argv = [name, *words]
runpy.run_path(name, run_name="__main__")
"""


def tool(name: str, *arguments: str) -> str:
    """What a tool prints."""
    return printed(SCRIPT.format(folder=str(TOOLS)), str(TOOLS / name), *arguments)


def whole_tool(name: str, *arguments: str) -> str:
    """The same of a tool that looks at the children of a process: nothing is forked from one with the libraries."""
    return _output(fresh(TOOLS / name, *arguments, cwd=TOOLS))


def printed(script: str, *arguments: str) -> str:
    """What a script prints that is run in the folder of the tools."""
    return _output(forked("-c", script, *arguments, cwd=TOOLS))


def _output(found: Finished) -> str:
    assert found.returncode == 0, found.stderr
    return found.stdout


def fork_what_is_started() -> None:
    """In the process of a tool, have its processes of ours forked, by `subprocess` and by `os.posix_spawn`."""
    use(os.environ[ADDRESS])
    spawn, wait = os.posix_spawn, os.wait4
    spawned: dict[int, Forked] = {}

    def spawn_forked(path: str, words: list[str], environment: Mapping[str, str], file_actions: Any) -> int:
        if path != sys.executable:
            return spawn(path, words, environment, file_actions=file_actions)
        files = {number: os.open(*opened) for _, number, *opened in file_actions}
        process = Forked(words, stdin=subprocess.DEVNULL, stdout=files[1], stderr=files[2], env=environment)
        spawned[process.pid] = process
        for file in files.values():
            os.close(file)
        return process.pid

    def wait_for(number: int, options: int) -> Any:
        if number not in spawned:
            return wait(number, options)
        return number, spawned.pop(number).wait(), resource.getrusage(resource.RUSAGE_SELF)

    subprocess.Popen, os.posix_spawn, os.wait4 = Forked, spawn_forked, wait_for  # type: ignore[assignment,misc]
