"""What dead runs left: partial folders with our journal in them, adapters half combined, trials that were measured.

Also blocks that were rounded by calibration for an artifact that was not built, and the distributions of references,
which a later check would use. All of it is removed only while no run
holds the run folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_export.drift.reference_store import kept_references
from qlora_export.engine.build import locked
from qlora_export.engine.calibration.store import folders_of_blocks, remove_blocks
from qlora_export.engine.journal import is_ours
from qlora_export.engine.partial_folder import remove_partial
from qlora_export.engine.trial_folders import TRIALS
from qlora_export.errors import UsageError
from qlora_export.merge.combine import COMBINED_NAME
from qlora_export.planning.disk_checks import allocated_bytes


@dataclass(frozen=True)
class Leftover:
    """A partial folder and the disk space it holds."""

    path: Path
    bytes: int


def find_leftovers(out: Path) -> list[Leftover]:
    """The partial folders of a run folder, by name; raises UsageError while a run is at work there."""
    if not out.is_dir():
        raise UsageError(f"{out}: no such folder", "give the folder that --out named")
    with locked(out):
        found = [path for path in out.glob("*.partial") if is_ours(path) or path.name.startswith(COMBINED_NAME)]
        found += [*folders_of_blocks(out), *kept_references(out)]
        found += [out / name for name in TRIALS if (out / name).is_dir() and not (out / name).is_symlink()]
        return [Leftover(path, allocated_bytes(path)) for path in sorted(found)]


def remove_leftovers(out: Path, leftovers: Sequence[Leftover]) -> None:
    """Remove partial folders that `find_leftovers` named."""
    with locked(out):
        blocks = folders_of_blocks(out)
        for leftover in leftovers:
            if is_ours(leftover.path):
                remove_partial(leftover.path)
            elif leftover.path in blocks:
                remove_blocks(leftover.path)
            else:
                shutil.rmtree(leftover.path)
