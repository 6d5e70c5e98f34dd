"""The tools, each in a process that finds the libraries imported, as do those that it starts by `subprocess`."""

from __future__ import annotations

from pathlib import Path

from tests.processes import Finished, forked, fresh

TOOLS = Path(__file__).parents[2] / "tools"
# The tool's folder comes first in the path, its name before its words.
SCRIPT = """
import os, runpy, subprocess, sys
from tests import processes
processes.use(os.environ[processes.ADDRESS])
subprocess.Popen = processes.Forked
name, *words = sys.argv[1:]
sys.path[0] = {folder!r}
sys.argv = [name, *words]
runpy.run_path(name, run_name="__main__")
"""


def tool(name: str, *arguments: str) -> str:
    """What a tool prints."""
    return printed(SCRIPT.format(folder=str(TOOLS)), str(TOOLS / name), *arguments)


def whole_tool(name: str, *arguments: str) -> str:
    """The same of a tool that times and weighs whole processes: nothing is forked from a process with the libraries."""
    return _output(fresh(TOOLS / name, *arguments, cwd=TOOLS))


def printed(script: str, *arguments: str) -> str:
    """What a script prints that is run in the folder of the tools."""
    return _output(forked("-c", script, *arguments, cwd=TOOLS))


def _output(found: Finished) -> str:
    assert found.returncode == 0, found.stderr
    return found.stdout
