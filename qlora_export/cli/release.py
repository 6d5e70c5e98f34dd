"""`qlora-export release`: the whole way, from plan to publication."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_export.cli.options import Outcome

if TYPE_CHECKING:
    from qlora_export.pipeline.options import RunOptions
    from qlora_export.recipe.config import Recipe


def release(recipe: Recipe, options: RunOptions) -> Outcome:
    """Plan, build, export, check, and publish what passed; nothing at all when one failed that may not be withheld."""
    from qlora_export.pipeline import release as pipeline
    from qlora_export.report.data import exit_code, report, write_report
    from qlora_export.report.terminal import print_release

    run = pipeline.release(recipe, options)
    write_report(run, options.out)
    return report(run), lambda: print_release(run), int(exit_code(run))
