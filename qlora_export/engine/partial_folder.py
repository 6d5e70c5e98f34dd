"""A folder in the making: `OUT/NAME.partial`, which becomes `OUT/NAME` in one rename when everything in it is right.

Nothing that was there before is adopted: a partial folder without our journal, with a file we did not plan, or with a
link in it is an error. Links are never followed when writing.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from qlora_export.artifact import MANIFEST_NAME, file_facts
from qlora_export.engine.journal import JOURNAL_NAME, Journal, marked
from qlora_export.engine.manifest import make_manifest
from qlora_export.errors import UsageError
from qlora_export.merge.companion_files import CompanionFile
from qlora_export.planning.plan import ArtifactPlan, Plan
from qlora_export.tensors.writing import ShardWriter

COPY_BYTES = 1 << 20


class PartialFolder:
    """The partial folder of one artifact, with its journal and its open weight files."""

    def __init__(self, item: ArtifactPlan, out: Path) -> None:
        self.item = item
        self.path = out / f"{item.name}.partial"
        self._final = out / item.name
        _require_ours(self.path, {*item.files, MANIFEST_NAME, JOURNAL_NAME})
        self.path.mkdir(exist_ok=True)
        self.journal = Journal(self.path, item.digest)
        if not self._weights_intact():
            self.journal.restart()
        self._require_made(f"made {item.made.digest}")
        self.writer = ShardWriter(self.path, item.layout)
        sync_folder(self.path)
        sync_folder(out)

    def finish(self, plan: Plan, sources: dict[str, dict[str, object]]) -> None:
        """Write what is missing beside the weights, the manifest last, and give the folder its name."""
        for file in self.item.carried:
            write_file(self.path, file)
        weights = self.writer.facts()
        facts = {name: weights.get(name) or file_facts(self.path / name) for name in self.item.files}
        self.writer.close()
        write_file(self.path, CompanionFile(MANIFEST_NAME, content=make_manifest(plan, self.item, sources, facts)))
        for place in {self.path, *(self.path.joinpath(name).parent for name in facts)}:
            sync_folder(place)
        self.path.rename(self._final)
        sync_folder(self._final.parent)
        (self._final / JOURNAL_NAME).unlink()

    def _require_made(self, mark: str) -> None:
        """Forget what was built from parts that were decided otherwise."""
        if self.item.made.parts and not marked(self.path, mark):
            self.journal.restart()
            self.journal.mark(mark)

    def _weights_intact(self) -> bool:
        """Whether every weight file has its planned size and header."""
        for shard in self.item.layout.shards:
            path = self.path / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes:
                return False
            with path.open("rb") as file:
                if file.read(len(shard.header)) != shard.header:
                    return False
        return True


def write_file(folder: Path, file: CompanionFile) -> None:
    """Write one file below the folder and bring it to the disk; never through a link."""
    path = folder / file.name
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "wb") as target:
        if file.source is None:
            target.write(file.content)
        else:
            with file.source.open("rb") as source:
                shutil.copyfileobj(source, target, COPY_BYTES)
        target.flush()
        os.fsync(target.fileno())


def remove_partial(folder: Path) -> None:
    """Remove a partial folder of ours, its journal last, so that a kill in between leaves it ours."""
    for path in folder.iterdir():
        if path.name == JOURNAL_NAME:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    (folder / JOURNAL_NAME).unlink(missing_ok=True)
    folder.rmdir()


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require_ours(folder: Path, planned: set[str]) -> None:
    """Raise UsageError unless the folder is absent, empty, or was left behind by a run of ours."""
    if not os.path.lexists(folder):
        return
    hint = f"move {folder} away or choose another --out"
    if folder.is_symlink() or not folder.is_dir():
        raise UsageError(f"{folder}: exists and is no folder", hint)
    entries = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    if entries and not (folder / JOURNAL_NAME).is_file():
        raise UsageError(f"{folder}: exists and is not left behind by a run of ours (no {JOURNAL_NAME})", hint)
    for path in entries:
        if path.is_symlink() or not path.is_file() or str(path.relative_to(folder)) not in planned:
            raise UsageError(f"{path}: is no file that a run of this plan writes", hint)
