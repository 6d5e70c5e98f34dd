"""Build all artifacts of a plan in one pass over the base.

    OUT/NAME.partial/  files at full size, written in any order, .journal   ->   OUT/NAME/  with manifest.json

Nothing final is on the disk before everything is right: data and manifest are synced, then the folder is renamed. A
killed run leaves NAME.partial, which the next run of the same plan completes to the same bytes. A finished folder of
the same plan is verified and kept. Cost: the base is read once from the disk and a second time from the page cache.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from qlora_export.build.journal import JOURNAL_NAME, Journal
from qlora_export.build.manifest import (
    MANIFEST_NAME,
    FileFacts,
    file_facts,
    make_manifest,
    read_artifact,
    require_same_sources,
    verify_artifact,
)
from qlora_export.build.tensor_job import RowBlock, TensorJob
from qlora_export.build.workers import StagedJob, WorkerPool
from qlora_export.contracts import Artifact, Progress
from qlora_export.errors import UsageError
from qlora_export.merge.carried import CarriedFile
from qlora_export.plan import ArtifactPlan, Plan
from qlora_export.tensors.reading import SourceFiles
from qlora_export.tensors.writing import ShardWriter, disk_full


@dataclass(frozen=True)
class BuildOptions:
    """How a build runs; none of it changes a byte. `progress` is told bytes done and bytes in all."""

    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    checkpoint_bytes: int = 256_000_000
    progress: Progress = lambda done, total: None


def build(plan: Plan, out: Path, options: BuildOptions) -> list[Artifact]:
    """Build what is missing and verify what is there; the artifacts in the recipe's order."""
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        finished = {item.name: _finished(item, out) for item in plan.artifacts}
        missing = [item for item in plan.artifacts if finished[item.name] is None]
        sources = _Sources(plan)
        if missing:
            with _disk_errors(out, sum(item.bytes for item in missing)):
                _build_missing(plan, missing, out, options, sources)
        else:
            sources.hash_all(options.workers)
        for artifact in finished.values():
            if artifact is not None:
                require_same_sources(artifact, sources.facts)
        return [finished[item.name] or read_artifact(out / item.name) for item in plan.artifacts]


class _Sources:
    """Digests of the base's weight files, taken while they are in the page cache."""

    def __init__(self, plan: Plan) -> None:
        self.paths = plan.checkpoint.files
        self.facts: FileFacts = {}

    def hash_file(self, path: Path) -> None:
        self.facts[path.name] = file_facts(path)

    def hash_all(self, workers: int) -> None:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(self.hash_file, self.paths))

    def sorted(self) -> FileFacts:
        return dict(sorted(self.facts.items()))


class _HashJob:
    """Hashing a source file, as a job of the pool."""

    blocks = (RowBlock(0, 1),)
    observes = False

    def __init__(self, sources: _Sources, path: Path) -> None:
        self._sources = sources
        self._path = path

    def observe(self, block: RowBlock) -> None:
        """There is no first pass."""

    def settle(self) -> None:
        """There is no first pass."""

    def encode(self, block: RowBlock) -> None:
        self._sources.hash_file(self._path)

    def seal(self) -> None:
        """The digest is already noted."""


def _build_missing(
    plan: Plan, missing: Sequence[ArtifactPlan], out: Path, options: BuildOptions, sources: _Sources
) -> None:
    folders = [out / f"{item.name}.partial" for item in missing]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    journals = [Journal(folder, item.digest) for folder, item in zip(folders, missing, strict=True)]
    with ExitStack() as stack:
        files = stack.enter_context(SourceFiles())
        writers = [
            (item, stack.enter_context(ShardWriter(folder, item.layout)))
            for folder, item in zip(folders, missing, strict=True)
        ]
        _run_jobs(plan, writers, journals, options, sources, files)
    for item, folder in zip(missing, folders, strict=True):
        _finish(plan, item, folder, out / item.name, sources)


def _run_jobs(
    plan: Plan,
    writers: Sequence[tuple[ArtifactPlan, ShardWriter]],
    journals: Sequence[Journal],
    options: BuildOptions,
    sources: _Sources,
    files: SourceFiles,
) -> None:
    written = set.intersection(*(journal.finished for journal in journals))
    left = [tensor for name, tensor in plan.checkpoint.tensors.items() if name not in written]
    makers: list[Callable[[], StagedJob]] = [partial(_HashJob, sources, path) for path in sources.paths]
    makers += [partial(TensorJob, plan, tensor, files, writers) for tensor in left]
    total = sum(tensor.bytes for tensor in plan.checkpoint.tensors.values())
    done = total - sum(tensor.bytes for tensor in left)
    unsynced: list[str] = []
    unsynced_bytes = 0

    def checkpoint() -> None:
        nonlocal unsynced_bytes
        for _, writer in writers:
            writer.sync()
        for journal in journals:
            journal.add(unsynced)
        unsynced.clear()
        unsynced_bytes = 0

    def finished(number: int) -> None:
        nonlocal done, unsynced_bytes
        if number < len(sources.paths):
            return
        tensor = left[number - len(sources.paths)]
        done += tensor.bytes
        unsynced_bytes += tensor.bytes
        unsynced.append(tensor.spec.name)
        if unsynced_bytes >= options.checkpoint_bytes:
            checkpoint()
        options.progress(done, total)

    WorkerPool(options.workers, finished).run(makers)
    checkpoint()


def _finish(plan: Plan, item: ArtifactPlan, folder: Path, final: Path, sources: _Sources) -> None:
    """Complete a partial folder whose weights are written, and give it its name."""
    extra = list(item.carried)
    if (index := item.layout.index()) is not None:
        extra.append(CarriedFile("model.safetensors.index.json", content=index))
    for file in extra:
        _write_carried(folder, file)
    names = sorted([shard.file for shard in item.layout.shards] + [file.name for file in extra])
    facts = {name: file_facts(folder / name) for name in names}
    manifest = make_manifest(plan, item, sources.sorted(), facts)
    _write_carried(folder, CarriedFile(MANIFEST_NAME, content=manifest))
    for place in {folder, *(folder.joinpath(name).parent for name in names)}:
        _sync_folder(place)
    folder.rename(final)
    _sync_folder(final.parent)
    (final / JOURNAL_NAME).unlink()


def _write_carried(folder: Path, file: CarriedFile) -> None:
    path = folder / file.name
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as target:
        if file.source is None:
            target.write(file.content)
        else:
            with file.source.open("rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finished(item: ArtifactPlan, out: Path) -> Artifact | None:
    """The verified artifact of this plan when its folder is there; raises when the folder is anything else."""
    folder = out / item.name
    if not folder.exists():
        return None
    artifact = read_artifact(folder)
    if artifact.manifest["plan_digest"] != item.digest:
        raise UsageError(
            f"{folder}: an artifact of another plan "
            f"({str(artifact.manifest['plan_digest'])[:12]}, this one is {item.digest[:12]})",
            "choose another --out, or remove the folder to build it again",
        )
    verify_artifact(artifact)
    (folder / JOURNAL_NAME).unlink(missing_ok=True)
    return replace(artifact, reused=True)


@contextmanager
def _disk_errors(out: Path, needed_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(out, needed_bytes) from None
        raise


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep a second run out of the same folder."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UsageError(f"{out}: another run is building here", "wait for it, or choose another --out") from None
    finally:
        os.close(descriptor)
