"""Whether the run folder may be where it is, and whether the artifacts fit the disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from qlora_export.errors import ExitCode, Problem

SECTOR_BYTES = 512


def place_problems(out: Path, sources: list[Path]) -> list[Problem]:
    """Sources are never written to, so the run folder may not be or lie in one."""
    place = out.absolute().resolve()
    return [
        Problem(ExitCode.USAGE, f"{out}: lies in the source {source}", "choose another --out")
        for source in sources
        if source.resolve() in (place, *place.parents)
    ]


def allocated_bytes(folder: Path) -> int:
    """Disk space that the files below a folder hold; 0 when there is none."""
    return sum(path.lstat().st_blocks * SECTOR_BYTES for path in folder.rglob("*"))


def disk_problems(out: Path, sizes: Mapping[str, int], working: int = 0) -> list[Problem]:
    """A problem when the artifacts that are not finished yet, by name and bytes, do not fit the disk.

    `working` bytes come and go while one of them is made.
    """
    needed = working
    for name, size in sizes.items():
        if not (out / name).exists():
            needed += max(0, size - allocated_bytes(out / f"{name}.partial"))
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed <= free:
        return []
    while_working = f", {working} of them while they are made" if working else ""
    message = f"{out}: the artifacts need {needed} bytes{while_working}, the disk has {free} free"
    return [Problem(ExitCode.ENVIRONMENT, message, "free some disk space or choose another --out")]
