"""`qlora-export build`: make the artifacts, measure nothing."""

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


def build(
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
    """Merge and encode all artifacts in one pass over the base; finished ones are verified and kept."""
    from qlora_export.pipeline import run_build
    from qlora_export.report.data import report, write_report
    from qlora_export.report.terminal import print_artifacts

    facts = recipe_from(recipe, base, adapter, formats, onto, text)
    options = run_options(recipe, out, workers)
    run = run_build(facts, options)
    if not all(artifact.reused for artifact in run.artifacts):
        write_report(run, options.out)
    if as_json:
        print(json.dumps(report(run), indent=2))
    else:
        print_artifacts(run)
