"""The lint before upload: everything that a release must never hold, all findings at once, before a byte is sent.

Names first: what breaks a rule there is never opened. Then the lists, the licence, the origin, the companions, the
weights (headers, index, every value), what config.json says of them, adapters, ONNX data and secrets.
Cost: one read of the weights.
"""

from __future__ import annotations

from qlora_export.errors import Problem
from qlora_export.publish.lint.companions import companion_problems
from qlora_export.publish.lint.contents import Contents
from qlora_export.publish.lint.licence import licence_problems
from qlora_export.publish.lint.listing import look_over
from qlora_export.publish.lint.onnx_data import graph_problems
from qlora_export.publish.lint.origin import adapter_problems, is_adapter, pin_problems
from qlora_export.publish.lint.rules import RULES
from qlora_export.publish.lint.secrets import secret_problems
from qlora_export.publish.lint.settings import setting_problems
from qlora_export.publish.lint.weights import index_problems, read_weights, value_problems
from qlora_export.publish.staged_folder import Staged

__all__ = ["RULES", "lint"]


def lint(staged: Staged, license: str | None, base_license: str | None) -> list[Problem]:  # noqa: A002
    """Every reason not to publish what is staged; each begins with its path in the repository and ends in its rule."""
    contents, problems = look_over(staged)
    problems += licence_problems(contents, license, base_license)
    for prefix, artifact in staged.artifacts.items():
        problems += pin_problems(prefix, artifact)
        if not is_adapter(artifact):
            problems += companion_problems(contents, prefix)
    problems += _weight_problems(contents, staged)
    problems += graph_problems(contents)
    problems += secret_problems(contents)
    return list(dict.fromkeys([*problems, *contents.problems]))


def _weight_problems(contents: Contents, staged: Staged) -> list[Problem]:
    folders, problems = read_weights(contents)
    for folder in folders:
        problems += index_problems(contents, folder)
        problems += setting_problems(contents, folder)
        problems += value_problems(folder)
    problems += adapter_problems(contents, staged, folders)
    return problems
