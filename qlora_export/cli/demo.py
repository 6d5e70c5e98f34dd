"""`qlora-export demo`: the whole way on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_export.cli.options import Json, Workers, finish, run_options

STORY = """
What you see: the adapter of the embedded model is a real QLoRA run. Adding it to the de-quantised base and rounding
back to NF4 by nearest ("nf4-nearest") falls onto the very grid the base came from, so most of the small delta is
rounded away, and the gate stops it. Added to the base as it was before it was quantised ("nf4-dithered"), the delta
survives, with noise instead; calibrated on dialogues of the task ("nf4-calibrated"), nearly all of the noise goes, at
the same size. The codes of training with the adapter beside them ("nf4-adapter") lose nothing, nor does "bf16".
"""


def demo(
    out: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("out/demo"),
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Release the embedded model to a folder: what plain NF4 rounding loses, and what does not lose it."""
    from qlora_export.cli.release import release
    from qlora_export.demo import recipe_path
    from qlora_export.recipe.config import PublishRecipe
    from qlora_export.recipe.load import load_recipe

    destination = PublishRecipe(to=f"folder:{out.absolute() / 'registry'}")
    recipe = load_recipe(recipe_path()).model_copy(update={"publish": destination})
    options = run_options(None, out, workers)
    data, show, code = release(recipe, options)

    def tell() -> None:
        show()
        print(STORY)
        print(f"report: {options.out / 'report.html'}, report.md and report.json")

    finish((data, tell, code), as_json)
