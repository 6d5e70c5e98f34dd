"""`qlora-export demo`: the whole way on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qlora_export.cli.options import Json, Workers, run_options

STORY = """
What you see: the adapter of the embedded model is a real QLoRA run. Adding it to the de-quantised base and rounding
back to NF4 by nearest ("nf4") falls onto the very grid the base came from, so most of the small delta is rounded away,
and the gate stops it. The same codes with the adapter beside them ("nf4-adapter") lose nothing, nor does "bf16".
"""


def demo(
    out: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("out/demo"),
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Plan, build and check the embedded model: what plain NF4 rounding loses, and what does not lose it."""
    from qlora_export.demo import recipe_path
    from qlora_export.pipeline import run_check
    from qlora_export.recipe import load_recipe
    from qlora_export.report.data import exit_code, report, write_report
    from qlora_export.report.terminal import print_ledger

    options = run_options(None, out, workers)
    run = run_check(load_recipe(recipe_path()), options)
    path = write_report(run, options.out)
    if as_json:
        print(json.dumps(report(run), indent=2))
    elif run.ledger is not None:
        print_ledger(run, run.ledger)
        print(STORY)
        print(f"report: {path}")
    raise typer.Exit(int(exit_code(run)))
