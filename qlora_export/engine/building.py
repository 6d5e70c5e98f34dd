"""Build all artifacts of a plan in one pass over the base.

    OUT/NAME.partial/  files at full size, written in any order, .journal   ->   OUT/NAME/  with manifest.json

Nothing final is on the disk before everything is right: data and manifest are synced, then the folder is renamed. A
killed run leaves NAME.partial, which the next run of the same plan completes to the same bytes. A finished folder of
the same plan is verified and kept. Cost: the base is read once from the disk and again from the page cache, for the
digest of the file and for the absmax of the tensor.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from qlora_export.contracts import Artifact, Progress
from qlora_export.engine.journal import JOURNAL_NAME
from qlora_export.engine.manifest import read_artifact, require_same_sources, verify_artifact
from qlora_export.engine.partial import PartialFolder
from qlora_export.engine.source_digests import HashJob, SourceDigests
from qlora_export.engine.tensor_job import Destination, TensorJob
from qlora_export.engine.workers import StagedJob, WorkerPool
from qlora_export.errors import UsageError
from qlora_export.planning import ArtifactPlan, Plan
from qlora_export.sources.weights import Weight, weight_bytes
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
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file", "--out names a folder")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        finished = {item.name: finished_artifact(item, out) for item in plan.artifacts}
        kept = [artifact for artifact in finished.values() if artifact is not None]
        missing = [item for item in plan.artifacts if finished[item.name] is None]
        digests = SourceDigests(plan.checkpoint.files)
        if missing:
            with disk_errors(out, sum(item.bytes for item in missing)):
                _build_missing(plan, missing, kept, out, options, digests)
        else:
            digests.hash_all([path.name for path in digests.paths], options.workers)
            require_same_sources(kept, digests.facts)
        return [finished[item.name] or read_artifact(out / item.name) for item in plan.artifacts]


def _build_missing(
    plan: Plan,
    missing: Sequence[ArtifactPlan],
    kept: Sequence[Artifact],
    out: Path,
    options: BuildOptions,
    digests: SourceDigests,
) -> None:
    with ExitStack() as stack:
        files = stack.enter_context(SourceFiles())
        folders = []
        for item in missing:
            folders.append(PartialFolder(item, out))
            stack.callback(folders[-1].writer.close)
        _restart_unless_same_sources(folders, digests, options.workers)
        Pass(plan, folders, options, digests, files).run()
        require_same_sources(kept, digests.facts)
        for folder in folders:
            folder.finish(plan, digests.sorted())


def _restart_unless_same_sources(folders: Sequence[PartialFolder], digests: SourceDigests, workers: int) -> None:
    """Trust what a killed run left only while the base still holds the bytes it was made from."""
    digests.hash_all([name for folder in folders for name in folder.journal.sources], workers)
    for folder in folders:
        if any(digests.facts[name]["sha256"] != sha256 for name, sha256 in folder.journal.sources.items()):
            folder.journal.restart()


class Pass:
    """One pass over the base; tensors enter the journals after their bytes and their source's digest are there."""

    def __init__(
        self,
        plan: Plan,
        folders: Sequence[PartialFolder],
        options: BuildOptions,
        digests: SourceDigests,
        files: SourceFiles,
    ) -> None:
        self._folders = folders
        self._options = options
        self._digests = digests
        written = set.intersection(*(folder.journal.finished for folder in folders))
        writers = [(folder.item, folder.writer) for folder in folders]
        self._total = sum(weight_bytes(source) for source in plan.sources)
        self._done = 0
        self._makers: list[Callable[[], StagedJob]] = []
        self._subjects: list[Path | Weight] = []
        make = partial(_open_job, plan, files, _destinations(writers))
        sources = plan.sources
        for path in plan.checkpoint.files:
            self._makers.append(partial(HashJob, digests, path))
            self._subjects.append(path)
            self._add([source for source in sources if source.stored[0].path == path], written, make)
        self._own = [source for source in sources if plan.from_adapter(source)]
        self._add(self._own, written, make)
        self._unsynced: list[Weight] = []
        self._unsynced_bytes = 0

    def _add(self, sources: Sequence[Weight], written: AbstractSet[str], make: Callable[..., StagedJob]) -> None:
        for source in sources:
            if source.spec.name in written:
                self._done += weight_bytes(source)
            else:
                self._makers.append(partial(make, source))
                self._subjects.append(source)

    def run(self) -> None:
        """Run all jobs; raises the first error, after which only journalled tensors count."""
        WorkerPool(self._options.workers, self._finished).run(self._makers)
        self._checkpoint()

    def _finished(self, number: int) -> None:
        subject = self._subjects[number]
        if isinstance(subject, Path):
            for folder in self._folders:
                folder.journal.add_source(subject.name, self._digests.facts[subject.name]["sha256"])
            return
        self._done += weight_bytes(subject)
        self._unsynced.append(subject)
        self._unsynced_bytes += weight_bytes(subject)
        if self._unsynced_bytes >= self._options.checkpoint_bytes:
            self._checkpoint()
        self._options.progress(self._done, self._total)

    def _checkpoint(self) -> None:
        """Sync, then journal the tensors whose source has been hashed; the others wait for the next time."""
        hashed = self._digests.facts.keys()
        own = {id(source) for source in self._own}
        ready = [
            source.spec.name
            for source in self._unsynced
            if id(source) in own or hashed >= {tensor.path.name for tensor in source.stored}
        ]
        if not ready:
            return
        for folder in self._folders:
            folder.writer.sync()
        for folder in self._folders:
            folder.journal.add(ready)
        written = set(ready)
        self._unsynced = [source for source in self._unsynced if source.spec.name not in written]
        self._unsynced_bytes = sum(weight_bytes(source) for source in self._unsynced)


def _destinations(writers: Sequence[tuple[ArtifactPlan, ShardWriter]]) -> dict[int, list[Destination]]:
    """What is made from each source, by the identity of the source."""
    found: dict[int, list[Destination]] = {}
    for artifact, writer in writers:
        for route in artifact.routes.values():
            found.setdefault(id(route.output.source), []).append(Destination(artifact, writer, route))
    return found


def _open_job(
    plan: Plan, files: SourceFiles, destinations: Mapping[int, Sequence[Destination]], source: Weight
) -> TensorJob:
    return TensorJob(plan, source, files, destinations.get(id(source), ()))


def finished_artifact(item: ArtifactPlan, out: Path) -> Artifact | None:
    """The verified artifact of this plan when its folder is there; raises when the folder is anything else."""
    folder = out / item.name
    if not os.path.lexists(folder):
        return None
    artifact = read_artifact(folder)
    if artifact.manifest["plan_digest"] != item.digest:
        raise UsageError(
            f"{folder}: an artifact of another plan "
            f"({str(artifact.manifest['plan_digest'])[:12]}, this one is {item.digest[:12]})",
            "choose another --out, or remove the folder to build it again",
        )
    (folder / JOURNAL_NAME).unlink(missing_ok=True)
    verify_artifact(artifact, item.files)
    return replace(artifact, reused=True)


@contextmanager
def disk_errors(out: Path, needed_bytes: int) -> Iterator[None]:
    """Turn a full disk into its own error."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise disk_full(out, needed_bytes) from None
        raise


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second run out of the same folder."""
    descriptor = os.open(out, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UsageError(f"{out}: another run is building here", "wait for it, or choose another --out") from None
    finally:
        os.close(descriptor)
