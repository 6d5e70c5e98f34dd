"""The tools, each in a process that finds the libraries imported."""

from __future__ import annotations

from pathlib import Path

from tests.processes import forked

TOOLS = Path(__file__).parents[2] / "tools"
# What the interpreter does with a script: its folder comes first in the path, its name before its words.
SCRIPT = """
import runpy, sys
name, *words = sys.argv[1:]
sys.path[0] = {folder!r}
sys.argv = [name, *words]
runpy.run_path(name, run_name="__main__")
"""


def tool(name: str, *arguments: str) -> str:
    """What a tool prints."""
    return printed(SCRIPT.format(folder=str(TOOLS)), str(TOOLS / name), *arguments)


def printed(script: str, *arguments: str) -> str:
    """What a script prints that is run in the folder of the tools."""
    found = forked("-c", script, *arguments, cwd=TOOLS)
    assert found.returncode == 0, found.stderr
    return found.stdout
