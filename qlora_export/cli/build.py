"""`qlora-export build`: make the artifacts, measure nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_export.cli.options import Outcome

if TYPE_CHECKING:
    from qlora_export.pipeline.options import RunOptions
    from qlora_export.recipe.config import Recipe


def build(recipe: Recipe, options: RunOptions) -> Outcome:
    """Merge, encode and export all artifacts, in one pass over the base; finished ones are verified and kept."""
    from qlora_export.pipeline import release as pipeline
    from qlora_export.report.data import REPORT_NAME, report, write_report
    from qlora_export.report.terminal import print_artifacts

    run = pipeline.build(recipe, options)
    built = not all(artifact.reused for artifact in run.artifacts)
    if built or not (options.out / REPORT_NAME).exists():
        write_report(run, options.out)
    return report(run), lambda: print_artifacts(run), 0
