"""`qlora-export plan`: what a build would do, from headers alone."""

from __future__ import annotations

import json

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


def plan(
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
    """Say what a build would make, from headers alone: files, sizes, memory, assumptions, and every problem at once."""
    from qlora_export.pipeline import run_plan
    from qlora_export.report.terminal import print_plan

    facts = recipe_from(recipe, base, adapter, formats, onto, text)
    options = run_options(recipe, out, workers)
    run = run_plan(facts, options)
    if as_json:
        print(json.dumps(run.plan.summary(options.workers), indent=2))
    else:
        print_plan(run, options.workers)
