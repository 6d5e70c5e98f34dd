"""`qlora-export doctor`: what would stop a release on this machine, and how to put it right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_export.cli.options import Json, Out, Workers, finish

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_export.pipeline.doctor.checks import Check

MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe to look at, too.", metavar="[RECIPE]")] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Ask the Hub, even if no recipe publishes there.")] = False,
    out: Out = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Look for what would stop a release: versions, disk, memory, device, endpoint, token; each with its remedy."""
    from qlora_export.pipeline.doctor.checks import as_data, exit_code

    folder = out or (Path("out") / recipe.stem if recipe else Path("out"))
    found = _of_recipe(recipe, folder, workers, hub) if recipe is not None else _of_machine(folder, hub)
    finish((as_data(found), lambda: _show(found), int(exit_code(found))), as_json)


def _of_machine(out: Path, hub: bool) -> list[Check]:
    """Without a recipe; imports nothing that may be what is missing."""
    from qlora_export.pipeline.doctor.hub import hub_checks
    from qlora_export.pipeline.doctor.libraries import library_checks
    from qlora_export.pipeline.doctor.machine import Needs, machine_checks

    return [*library_checks(()), *machine_checks(out, Needs()), *(hub_checks(()) if hub else ())]


def _of_recipe(path: Path, out: Path, workers: int | None, hub: bool) -> list[Check]:
    from qlora_export.pipeline.doctor.hub import hub_checks
    from qlora_export.pipeline.doctor.libraries import library_checks
    from qlora_export.pipeline.doctor.machine import machine_checks, usable_threads
    from qlora_export.pipeline.doctor.recipe_checks import (
        extras_of,
        recipe_checks,
        repositories_of,
        with_resolved_formats,
    )
    from qlora_export.recipe.load import load_recipe

    recipe = load_recipe(path)
    repositories = repositories_of(with_resolved_formats(recipe, out))
    libraries = library_checks(extras_of(recipe))
    of_recipe, needs = recipe_checks(recipe, out, workers or usable_threads())
    asked = hub_checks(repositories) if hub or repositories else []
    return [*libraries, *of_recipe, *machine_checks(out, needs), *asked]


def _show(found: Sequence[Check]) -> None:
    width = max(len(check.id) for check in found)
    for check in found:
        print(f"{MARKS[check.status]}  {check.id:<{width}}  {check.value}")
        if check.fix and check.status != "ok":
            print(f"      {'':<{width}}  fix: {check.fix}")
