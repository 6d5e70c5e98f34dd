"""`qlora-export check`: build what is missing, then measure every artifact and judge it."""

from __future__ import annotations

import json

import typer

from qlora_export.cli.options import (
    AdapterFolder,
    Base,
    Formats,
    Json,
    OntoName,
    Out,
    RecipePath,
    Text,
    Workers,
    recipe_from,
    run_options,
)


def check(
    recipe: RecipePath = None,
    base: Base = None,
    adapter: AdapterFolder = None,
    formats: Formats = None,
    onto: OntoName = None,
    text: Text = None,
    out: Out = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Measure the drift of every artifact from the model that was trained; exit 3 when one drifted too far."""
    from qlora_export.pipeline import run_check
    from qlora_export.report.data import exit_code, report, write_report
    from qlora_export.report.terminal import print_ledger

    facts = recipe_from(recipe, base, adapter, formats, onto, text)
    options = run_options(recipe, out, workers)
    run = run_check(facts, options)
    write_report(run, options.out)
    if as_json:
        print(json.dumps(report(run), indent=2))
    elif run.ledger is not None:
        print_ledger(run, run.ledger)
    raise typer.Exit(int(exit_code(run)))
