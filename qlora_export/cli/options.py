"""The flags that verbs share, and the recipe that they or a file make."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_export.errors import UsageError

if TYPE_CHECKING:
    from qlora_export.pipeline import RunOptions
    from qlora_export.recipe import Recipe

RecipePath = Annotated[Path | None, typer.Argument(help="A recipe file; or use the flags instead.", metavar="[RECIPE]")]
Base = Annotated[str | None, typer.Option("--base", help="Folder of the base model.")]
AdapterFolder = Annotated[str | None, typer.Option("--adapter", help="Folder of the adapter.")]
Formats = Annotated[list[str] | None, typer.Option("--format", help="A format to make; repeat for several.")]
OntoName = Annotated[str | None, typer.Option("--onto", help="Merge base: as-trained (default) or original.")]
Text = Annotated[str | None, typer.Option("--text", help="Text to measure drift on: .jsonl or .txt.")]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder [default: out/RECIPE or out].")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Threads [default: all cores].")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def recipe_from(
    path: Path | None,
    base: str | None,
    adapter: str | None,
    formats: list[str] | None,
    onto: str | None,
    text: str | None,
) -> Recipe:
    """The recipe of a file, or of the flags; raises UsageError when both or neither are given."""
    from qlora_export.recipe import load_recipe, make_recipe

    flags = {"--base": base, "--adapter": adapter, "--format": formats, "--onto": onto, "--text": text}
    given = [name for name, value in flags.items() if value]
    if path is not None:
        if given:
            raise UsageError(f"a recipe and {', '.join(given)}", "put it into the recipe, or use the flags alone")
        return load_recipe(path)
    if not (base and adapter and formats):
        raise UsageError("no recipe", "give a recipe file, or --base, --adapter and at least one --format")
    data: dict[str, Any] = {"base": base, "adapter": adapter, "artifacts": [{"format": name} for name in formats]}
    if onto:
        data["merge"] = {"onto": onto}
    if text:
        data["drift"] = {"text": text}
    return make_recipe(data, Path(), "flags")


def run_options(recipe: Path | None, out: Path | None, workers: int | None) -> RunOptions:
    """Where and how to run."""
    from qlora_export.pipeline import RunOptions
    from qlora_export.report.terminal import show_progress

    folder = out or (Path("out") / recipe.stem if recipe else Path("out"))
    defaults = RunOptions(folder)
    return RunOptions(folder, workers or defaults.workers, show_progress)
