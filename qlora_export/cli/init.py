"""`qlora-export init`: a first recipe, with a word on every key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_export.cli.options import require_folders
from qlora_export.errors import UsageError

STDOUT = Path("-")


def init(
    base: Annotated[
        str | None, typer.Option("--base", help="Folder of the base, or its Hub id [default: the adapter's].")
    ] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", help="Folder or Hub id of the adapter.")] = None,
    to: Annotated[str | None, typer.Option("--to", help="Where to publish, as in hub:owner/name-{name}.")] = None,
    text: Annotated[str | None, typer.Option("--text", help="Text to measure drift on: .jsonl or .txt.")] = None,
    out: Annotated[Path, typer.Option("--out", help="The new file, or - for stdout.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented recipe for a base and an adapter; what the files tell is filled in. Never overwrites."""
    from qlora_export.cli.recipe_template import Start, first_recipe

    if out != STDOUT:
        require_folders(out)
    folder = Path() if out == STDOUT else out.parent
    recipe = first_recipe(Start(folder, base, adapter, to, text))
    if out == STDOUT:
        print(recipe, end="")
        return
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(recipe)
    except FileExistsError:
        raise UsageError(f"{out}: exists", "choose another --out, or remove the file") from None
    print(f"wrote {out}: look it through, then run `qlora-export plan {out}`")
