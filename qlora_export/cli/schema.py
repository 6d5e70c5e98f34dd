"""`qlora-export schema`: JSON Schemas of what is read and written."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer


def schema(
    kind: Annotated[Literal["recipe", "report", "plan", "compare"], typer.Argument(help="What to describe.")],
) -> None:
    """Print the JSON Schema of a recipe, a report, a plan or a comparison, for editors and for readers of the files."""
    from qlora_export.report.schemas import SCHEMAS

    print(json.dumps(SCHEMAS[kind](), indent=2))
