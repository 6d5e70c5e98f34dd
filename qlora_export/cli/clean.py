"""`qlora-export clean`: remove what killed runs left behind, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_export.cli.options import Json, finish


def clean(
    out: Annotated[Path, typer.Argument(help="A run folder.")],
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without it they are only named.")] = False,
    as_json: Json = False,
) -> None:
    """Name the partial folders of dead runs in a run folder, and remove them with --yes."""
    from qlora_export.pipeline.clean import find_leftovers, remove_leftovers
    from qlora_export.report.terminal import size

    found = find_leftovers(out)
    if yes:
        remove_leftovers(out, found)
    verb = "removed" if yes else "left behind"
    data = {
        "schema": 1,
        "exit_code": 0,
        "removed": yes,
        "leftovers": [{"path": str(item.path), "bytes": item.bytes} for item in found],
    }

    def show() -> None:
        for item in found:
            print(f"{verb}: {item.path} ({size(item.bytes)})")
        if not found:
            print("nothing was left behind")
        elif not yes:
            print("run again with --yes to remove; a run of the same recipe would go on from here instead")

    finish((data, show, 0), as_json)
