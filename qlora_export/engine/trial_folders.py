"""Trials: artifacts that are built to be measured and not to be kept, in a folder of their own below the run folder.

Its content is ours, so what another plan left there makes room, where a run folder would refuse.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_export.artifact import MANIFEST_NAME
from qlora_export.engine.build import locked
from qlora_export.engine.journal import JOURNAL_NAME, is_ours
from qlora_export.engine.partial_folder import remove_partial
from qlora_export.errors import UsageError

ONTO_TRIAL = "onto-trial"
COMPARISON_TRIAL = "compare-trial"
TRIALS = (ONTO_TRIAL, COMPARISON_TRIAL)


def make_room(trial: Path, digests: Mapping[str, str]) -> None:
    """Remove artifacts and partial folders of these names that other plans made; raises UsageError for a link."""
    if trial.is_symlink():
        raise UsageError(f"{trial}: is a link, and trials are removed from it", "remove the link")
    trial.mkdir(parents=True, exist_ok=True)
    with locked(trial):
        for name, digest in digests.items():
            folder, partial = trial / name, trial / f"{name}.partial"
            if _plan_of(folder / MANIFEST_NAME) not in (None, digest):
                shutil.rmtree(folder)
            if is_ours(partial) and _plan_of(partial / JOURNAL_NAME) != digest:
                remove_partial(partial)


def _plan_of(path: Path) -> Any:
    """The plan's digest in a manifest or at the head of a journal; None where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
        facts = json.loads(text.partition("\n")[0] if path.name == JOURNAL_NAME else text)
    except (OSError, ValueError):
        return None
    return facts.get("plan" if path.name == JOURNAL_NAME else "plan_digest") if isinstance(facts, dict) else None
