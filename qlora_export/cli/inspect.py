"""`qlora-export inspect`: what a folder is, and whether it could be merged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_export.cli.options import Json, finish

if TYPE_CHECKING:
    from rich.table import Table

    from qlora_export.planning.inspect import Inspection

EXPERT = re.compile(r"\.experts\.\d+\.")


def inspect(
    path: Annotated[Path, typer.Argument(help="An adapter, a checkpoint, or an artifact.")],
    base: Annotated[Path | None, typer.Option("--base", help="The base of an adapter: is it one that fits?")] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Measure the size of every change of an adapter.")] = False,
    as_json: Json = False,
) -> None:
    """Describe an adapter, a checkpoint or an artifact from its headers, and say what a merge would refuse."""
    from qlora_export.planning.inspect import inspect as look

    found = look(path, base, weights)
    finish((inspection_data(found), lambda: print_inspection(found), 0), as_json)


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
    from qlora_export.report.terminal import console_for_result, new_table, size

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
        console.print(_layers(found), highlight=False)
    for problem in found.problems:
        console.print(f"would be refused: {problem.message}", highlight=False, soft_wrap=True, markup=False)
    for hint in dict.fromkeys(problem.hint for problem in found.problems if problem.hint):
        console.print(f"hint: {hint}", highlight=False, soft_wrap=True, markup=False)


def _layers(found: Inspection) -> Table:
    from qlora_export.report.terminal import new_table

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
    return grid


def _ends(values: list[float]) -> tuple[float, ...]:
    """The smallest and the largest."""
    return (min(values), max(values)) if values else ()
