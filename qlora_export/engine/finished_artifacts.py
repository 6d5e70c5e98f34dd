"""The artifacts of a plan as an earlier run left them: verified, and nothing built."""

from __future__ import annotations

import os
from pathlib import Path

from qlora_export.artifact import Artifact
from qlora_export.engine.build import finished_artifact, locked
from qlora_export.engine.export import kept_export
from qlora_export.errors import UsageError
from qlora_export.planning.plan import Plan

HINT = "run build or check with this recipe and --out first, or release"


def finished(plan: Plan, out: Path) -> list[Artifact]:
    """All artifacts in the recipe's order; raises UsageError where one is missing, VerifyMismatch where one changed."""
    if not out.is_dir():
        raise UsageError(f"{out}: nothing was built there", HINT)
    with locked(out):
        made = {}
        for item in plan.artifacts:
            artifact = finished_artifact(item, out)
            if artifact is None:
                raise UsageError(f"{out / item.name}: was not built", HINT)
            made[item.name] = artifact
        for export in plan.exports:
            if not os.path.lexists(out / export.name):
                raise UsageError(f"{out / export.name}: was not built", HINT)
            made[export.name] = kept_export(export, made.get(export.source_name), out / export.name)
    return [made[item.name] for item in plan.recipe.artifacts]
