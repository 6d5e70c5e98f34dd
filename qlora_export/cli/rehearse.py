"""`qlora-export rehearse`: the whole release against a Hub on this machine."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_export.cli.options import Json, Workers, finish, run_options
from qlora_export.errors import UsageError

if TYPE_CHECKING:
    from qlora_export.recipe.config import Recipe

REHEARSAL_TOKEN = "hf_rehearsal"  # noqa: S105  any word will do
DEMO_OUT = Path("out/rehearsal")
DEFAULT_PLACE = "hub:rehearsal/{name}"
Faults = Annotated[
    list[str] | None, typer.Option("--fault", help="Let the Hub fail in this way; repeat. `list` names them.")
]


def rehearse(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="A recipe file; without one, the embedded model is released.", metavar="[RECIPE]"),
    ] = None,
    faults: Faults = None,
    hub: Annotated[Path | None, typer.Option("--hub", help="Keep the Hub's content in this folder.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder [default: out/RECIPE, or out/rehearsal].")
    ] = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Release to a Hub on this machine: no token, no network, the same commits, proofs and faults as the real one."""
    from qlora_export.cli.release import release
    from qlora_export.demo import recipe_path
    from qlora_export.recipe.load import load_recipe
    from qlora_export.testing import FAULTS, HubServer

    if "list" in (faults or ()):
        finish(({"schema": 1, "faults": dict(FAULTS)}, lambda: _print_faults(dict(FAULTS)), 0), as_json)
    _require_faults(faults or [])
    facts = _for_rehearsal(load_recipe(recipe or recipe_path()))
    with ExitStack() as stack:
        server = stack.enter_context(HubServer(hub, faults=tuple(faults or ())))
        environment = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": REHEARSAL_TOKEN, "HF_HUB_OFFLINE": "0"}
        options = replace(
            run_options(recipe, out or (None if recipe else DEMO_OUT), workers), publisher_environment=environment
        )
        outcome = release(facts, options)
    finish(outcome, as_json)


def _require_faults(names: list[str]) -> None:
    from qlora_export.testing.faults import Faults

    try:
        Faults(names)
    except ValueError as error:
        raise UsageError(f"--fault {error}", "rehearse --fault list names them") from None


def _for_rehearsal(recipe: Recipe) -> Recipe:
    """The recipe with a place on the Hub, where it has none."""
    from qlora_export.recipe.config import PublishRecipe

    if recipe.publish is not None and recipe.publish.to.startswith("hub:"):
        return recipe.model_copy(update={"publish": recipe.publish.model_copy(update={"collection": None})})
    facts = recipe.publish.model_dump(exclude={"to"}) if recipe.publish else {}
    return recipe.model_copy(update={"publish": PublishRecipe(**{**facts, "to": DEFAULT_PLACE})})


def _print_faults(faults: dict[str, str]) -> None:
    for name, meaning in faults.items():
        print(f"{name:<32} {meaning}")
