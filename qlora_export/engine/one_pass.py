"""One pass over the base makes everything that is missing, in all folders at once.

Source files are hashed by the same workers, each before its tensors, which brings them into the page cache; weight
files are hashed behind the writers; syncs have a thread of their own. A tensor counts as finished once its bytes and
the digest of its source are in the journals.
"""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from qlora_export.engine.checkpoints import Checkpoints
from qlora_export.engine.options import BuildOptions
from qlora_export.engine.partial import PartialFolder
from qlora_export.engine.source_digests import HashJob, SourceDigests
from qlora_export.engine.tensor_job import Destination, TensorJob
from qlora_export.engine.workers import StagedJob, WorkerPool
from qlora_export.planning import Plan, route_parts
from qlora_export.sources.weights import Weight, weight_bytes
from qlora_export.tensors.reading import SourceFiles

# Weight files are hashed in steps that a worker finishes in some hundredths of a second.
HASHED_BYTES_EACH = 32_000_000


def run_pass(
    plan: Plan, folders: Sequence[PartialFolder], options: BuildOptions, digests: SourceDigests, files: SourceFiles
) -> None:
    """Run all jobs; raises the first error, after which only journalled tensors count."""
    work = Pass(plan, folders, options, digests, files)
    with (
        few_collections(),
        Checkpoints(folders, options.checkpoint_bytes, work.is_listed, work.drops) as checkpoints,
    ):
        WorkerPool(options.workers, partial(work.finished, checkpoints)).run(work.makers())
        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(lambda folder: folder.writer.hash_behind(), folders))


@contextmanager
def few_collections() -> Iterator[None]:
    """Spare the garbage collector the modules and the plan, which it would look through again and again."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Pass:
    """What there is to do, and what is done: subjects are source files to hash and weights to make."""

    def __init__(
        self,
        plan: Plan,
        folders: Sequence[PartialFolder],
        options: BuildOptions,
        digests: SourceDigests,
        files: SourceFiles,
    ) -> None:
        self._plan = plan
        self._folders = folders
        self._options = options
        self._digests = digests
        self._files = files
        self._destinations = _destinations(folders)
        self._total = sum(weight_bytes(source) for source in plan.sources)
        self._counting = threading.Lock()
        self._listed: set[str] = set()
        written = set.intersection(*(folder.journal.finished for folder in folders))
        done = [source for source in plan.sources if source.spec.name in written]
        self._done = sum(weight_bytes(source) for source in done)
        for source in done:
            self._mark(source)
        self.subjects = _subjects(plan, [source for source in plan.sources if source.spec.name not in written])
        self._files_of = {source.spec.name: self._source_files(source) for source in plan.sources}
        self._left = Counter(_file(subject) for subject in self.subjects)

    @property
    def drops(self) -> bool:
        """Whether the page cache is kept clear of what the pass has done with."""
        return self._total + sum(folder.item.bytes for folder in self._folders) > self._options.cache_bytes

    def makers(self) -> list[Callable[[], StagedJob]]:
        """What opens the job of each subject."""
        return [
            partial(HashJob, self._digests, subject)
            if isinstance(subject, Path)
            else partial(TensorJob, self._plan, subject, self._files, self._destinations.get(id(subject), ()))
            for subject in self.subjects
        ]

    def is_listed(self, tensor: str) -> bool:
        """Whether the digest of every source file of a tensor stands in the journals."""
        return self._listed >= self._files_of[tensor]

    def finished(self, checkpoints: Checkpoints, number: int) -> None:
        """The job of a subject is done."""
        subject = self.subjects[number]
        if isinstance(subject, Path):
            for folder in self._folders:
                folder.journal.add_source(subject.name, self._digests.facts[subject.name]["sha256"])
            self._listed.add(subject.name)
        else:
            self._mark(subject)
            checkpoints.add(subject.spec.name, weight_bytes(subject))
        with self._counting:
            self._done += 0 if isinstance(subject, Path) else weight_bytes(subject)
            self._options.progress(self._done, self._total)
            self._left[_file(subject)] -= 1
        if self.drops and not self._left[_file(subject)]:
            self._files.drop(_file(subject))
        for folder in self._folders:
            folder.writer.hash_behind(HASHED_BYTES_EACH)

    def _mark(self, source: Weight) -> None:
        for destination in self._destinations.get(id(source), ()):
            destination.writer.done(part.name for part in route_parts(destination.route))

    def _source_files(self, source: Weight) -> set[str]:
        """Names of the base's files that a weight is read from; the adapter is hashed when it is opened."""
        return set() if self._plan.from_adapter(source) else {tensor.path.name for tensor in source.stored}


def _file(subject: Path | Weight) -> Path:
    """The file that a subject begins in, or is."""
    return subject if isinstance(subject, Path) else subject.stored[0].path


def _subjects(plan: Plan, missing: Sequence[Weight]) -> list[Path | Weight]:
    """Every file of the base before the weights that begin in it; the adapter's own weights last."""
    groups: dict[Path, list[Weight]] = {path: [] for path in plan.checkpoint.files}
    for source in missing:
        groups.setdefault(_file(source), []).append(source)
    base = set(plan.checkpoint.files)
    return [subject for path, group in groups.items() for subject in ([path] * (path in base) + group)]


def _destinations(folders: Sequence[PartialFolder]) -> Mapping[int, Sequence[Destination]]:
    """What is made from each source, by the identity of the source."""
    found: dict[int, list[Destination]] = {}
    for folder in folders:
        for route in folder.item.routes.values():
            found.setdefault(id(route.output.source), []).append(Destination(folder.item, folder.writer, route))
    return found
