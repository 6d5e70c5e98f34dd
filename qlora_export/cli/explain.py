"""`qlora-export explain`: what an exit code or a rule means, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from qlora_export.cli.options import Json, finish


def explain(
    code: Annotated[str, typer.Argument(help="An exit code by number or name, or the id of a rule.")],
    as_json: Json = False,
) -> None:
    """Explain an exit code or a rule of the linter: meaning, usual causes, what to do, and whether to run again."""
    from qlora_export.report.exit_codes import as_data, explanation, in_words

    found = explanation(code, _rules)
    finish((as_data(found), lambda: print(in_words(found)), 0), as_json)


def _rules() -> Mapping[str, str]:
    from qlora_export.publish.lint import RULES

    return RULES
