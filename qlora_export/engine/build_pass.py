"""One pass over the base makes everything that is missing, in all folders at once.

Source files are hashed by the same workers, each before its tensors, which brings them into the page cache; weight
files are hashed behind the writers; syncs have a thread of their own. A tensor counts as finished once its bytes and
the digest of its source are in the journals. Who does the work is exchangeable: threads of this process, or processes
on a cluster that write into the same files.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from qlora_export.engine.durable_progress import Checkpoints
from qlora_export.engine.gc_pause import gc_pause
from qlora_export.engine.options import BuildOptions
from qlora_export.engine.partial_folder import PartialFolder
from qlora_export.engine.ray.cluster import run_on_ray
from qlora_export.engine.source_digests import SourceDigests
from qlora_export.engine.spare_workers import SpareWorkers
from qlora_export.engine.work_items import Workshop, destinations_of, file_of, work_items_of
from qlora_export.engine.workers import StagedJob, WorkerPool
from qlora_export.planning.plan import Plan, route_parts
from qlora_export.quant.device.accelerator import Accelerator
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
        gc_pause(),
        Checkpoints(folders, options.checkpoint_bytes, work.is_listed, work.drops) as checkpoints,
    ):
        finished = partial(work.finished, checkpoints)
        if options.engine == "ray":
            run_on_ray(plan, work.subjects, folders, options, digests, finished)
        else:
            vacancies = SpareWorkers(options.spares)
            files.before_wait = digests.before_wait = vacancies.lend
            WorkerPool(options.workers, finished, vacancies).run(work.openers())
        with ThreadPoolExecutor(options.threads) as pool:
            list(pool.map(lambda folder: folder.writer.hash_behind(), folders))


class Pass:
    """What there is to do, and what is done."""

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
        self._destinations = destinations_of((folder.item, folder.writer) for folder in folders)
        self._total = sum(weight_bytes(source) for source in plan.sources)
        self._counting = threading.Lock()
        self._listed: set[str] = set()
        written = set.intersection(*(folder.journal.finished for folder in folders))
        done = [source for source in plan.sources if source.spec.name in written]
        self._done = sum(weight_bytes(source) for source in done)
        for source in done:
            self._mark(source)
        self.subjects = work_items_of(plan, [source for source in plan.sources if source.spec.name not in written])
        self._files_of = {source.spec.name: self._source_files(source) for source in plan.sources}
        self._left = Counter(file_of(subject) for subject in self.subjects)

    @property
    def drops(self) -> bool:
        """Whether the page cache is kept clear of what the pass has done with."""
        return self._total + sum(folder.item.bytes for folder in self._folders) > self._options.cache_bytes

    def openers(self) -> list[Callable[[], StagedJob]]:
        """What opens the job of each subject."""
        name = self._options.accelerator
        accelerator = Accelerator(name) if name is not None else None
        workshop = Workshop(self._plan, self._destinations, self._files, self._digests, accelerator)
        return [workshop.opener(subject) for subject in self.subjects]

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
            self._left[file_of(subject)] -= 1
        if self.drops and not self._left[file_of(subject)]:
            self._files.drop(file_of(subject))
        for folder in self._folders:
            folder.writer.hash_behind(HASHED_BYTES_EACH)

    def _mark(self, source: Weight) -> None:
        for destination in self._destinations.get(id(source), ()):
            destination.writer.done(part.name for part in route_parts(destination.route))

    def _source_files(self, source: Weight) -> set[str]:
        """Names of the base's files that a weight is read from; the adapter is hashed when it is opened."""
        return set() if self._plan.from_adapter(source) else {tensor.path.name for tensor in source.stored}
