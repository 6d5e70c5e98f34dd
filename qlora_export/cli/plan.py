"""`qlora-export plan`: what a build would do, from headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_export.cli.options import Outcome

if TYPE_CHECKING:
    from qlora_export.pipeline.options import RunOptions
    from qlora_export.recipe.config import Recipe


def plan(recipe: Recipe, options: RunOptions) -> Outcome:
    """Say what a build would make, from headers alone: files, sizes, memory, assumptions, and every problem at once."""
    from qlora_export.pipeline import release as pipeline
    from qlora_export.pipeline.lock import pins
    from qlora_export.planning.memory import workers_within
    from qlora_export.report.data import plan_summary
    from qlora_export.report.terminal import print_plan

    run = pipeline.plan(recipe, options)
    workers = workers_within(run.plan, options.workers, options.memory_limit_bytes)
    data = plan_summary(run.plan, workers)
    if options.keeps_plan:
        data |= pins(run.plan, workers)
    return data, lambda: print_plan(run, workers), 0
