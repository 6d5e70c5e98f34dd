"""`qlora-export check`: build what is missing, then measure every artifact and judge it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_export.cli.options import Outcome

if TYPE_CHECKING:
    from qlora_export.pipeline import RunOptions
    from qlora_export.recipe import Recipe


def check(recipe: Recipe, options: RunOptions) -> Outcome:
    """Measure the drift of every artifact from the model that was trained; exit 3 when one drifted too far."""
    from qlora_export import pipeline
    from qlora_export.report.data import exit_code, report, write_report
    from qlora_export.report.terminal import print_ledger

    run = pipeline.check(recipe, options)
    write_report(run, options.out)
    return report(run), lambda: print_ledger(run), int(exit_code(run))
