"""An inspection as a table and as JSON."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console

from qlora_export.planning.inspect import Inspection
from qlora_export.report.terminal import console_for_result, new_table, size

EXPERT = re.compile(r"\.experts\.\d+\.")


def inspection_data(found: Inspection) -> dict[str, Any]:
    """The inspection as JSON; keys are the table's with underscores."""
    return {
        "schema": 1,
        "exit_code": 0,
        "kind": found.kind,
        "path": str(found.path),
        **{name.replace(" ", "_"): value for name, value in found.facts.items()},
        "layers": {name: dict(facts) for name, facts in found.layers.items()},
        "problems": [
            {"exit_code": int(item.exit_code), "message": item.message, "hint": item.hint} for item in found.problems
        ],
        "mergeable": found.mergeable,
    }


def print_inspection(found: Inspection) -> None:
    """The inspection for people."""
    console = console_for_result()
    grid = new_table(f"{found.kind} {found.path}")
    grid.show_header = False
    grid.add_column("fact", no_wrap=True)
    grid.add_column("value", overflow="fold")
    for name, value in found.facts.items():
        if value not in (None, "", 0):
            grid.add_row(
                name, size(value) if name == "bytes" else f"{value:,}" if isinstance(value, int) else str(value)
            )
    console.print(grid, highlight=False)
    if found.layers:
        _print_layers(console, found)
    for problem in found.problems:
        console.print(f"would be refused: {problem.message}", highlight=False, soft_wrap=True, markup=False)
    for hint in dict.fromkeys(problem.hint for problem in found.problems if problem.hint):
        console.print(f"hint: {hint}", highlight=False, soft_wrap=True, markup=False)


def _print_layers(console: Console, found: Inspection) -> None:
    grid = new_table("Size of the changes, in the Frobenius norm")
    grid.add_column("tensor", no_wrap=True)
    grid.add_column("shape", justify="right")
    grid.add_column("|delta| / |W|", justify="right")
    groups: dict[tuple[str, str], list[float]] = {}
    for name, facts in found.layers.items():
        shape = " x ".join(str(length) for length in facts["shape"])
        ratios = groups.setdefault((EXPERT.sub(".experts.*.", name), shape), [])
        if facts["delta_over_weight"] is not None:
            ratios.append(facts["delta_over_weight"])
    for (name, shape), ratios in groups.items():
        grid.add_row(name, shape, " to ".join(dict.fromkeys(f"{ratio:.2%}" for ratio in _ends(ratios))))
    console.print(grid, highlight=False)


def _ends(values: list[float]) -> tuple[float, ...]:
    """The smallest and the largest."""
    return (min(values), max(values)) if values else ()
