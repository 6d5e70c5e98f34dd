"""`qlora-export inspect`: what a folder is, and whether it could be merged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_export.cli.options import Json, finish


def inspect(
    path: Annotated[Path, typer.Argument(help="An adapter, a checkpoint, or an artifact.")],
    base: Annotated[Path | None, typer.Option("--base", help="The base of an adapter: is it one that fits?")] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Measure the size of every change of an adapter.")] = False,
    as_json: Json = False,
) -> None:
    """Describe an adapter, a checkpoint or an artifact from its headers, and say what a merge would refuse."""
    from qlora_export.planning.inspect import inspect as look
    from qlora_export.report.inspection import inspection_data, print_inspection

    found = look(path, base, weights)
    finish((inspection_data(found), lambda: print_inspection(found), 0), as_json)
