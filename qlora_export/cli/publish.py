"""`qlora-export publish`: publish what an earlier check measured and passed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_export.cli.options import Outcome

if TYPE_CHECKING:
    from qlora_export.pipeline.options import RunOptions
    from qlora_export.recipe.config import Recipe


def publish(recipe: Recipe, options: RunOptions) -> Outcome:
    """Publish what an earlier check of this recipe measured and passed, in one commit; builds and measures nothing."""
    from qlora_export.pipeline import release as pipeline
    from qlora_export.report.data import publication
    from qlora_export.report.terminal import print_publication

    run = pipeline.publish(recipe, options)
    return publication(run), lambda: print_publication(run), 0
