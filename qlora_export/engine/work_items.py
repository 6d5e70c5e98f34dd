"""What a pass has to do, whoever does it: subjects are source files to hash and weights to make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qlora_export.engine.source_digests import HashJob, SourceDigests
from qlora_export.engine.tensor_job import Destination, TensorJob
from qlora_export.engine.workers import StagedJob
from qlora_export.planning.plan import ArtifactPlan, Plan
from qlora_export.quant.device.accelerator import Accelerator
from qlora_export.sources.weights import Weight
from qlora_export.tensors.reading import SourceFiles
from qlora_export.tensors.writing import ShardWriter

WorkItem = Path | Weight
# By the identity of the source: two weights may have one name, of which the adapter brings the other.
Destinations = Mapping[int, Sequence[Destination]]


def work_items_of(plan: Plan, missing: Iterable[Weight]) -> list[WorkItem]:
    """Every file of the base before the weights that begin in it; the adapter's own weights last."""
    groups: dict[Path, list[Weight]] = {path: [] for path in plan.checkpoint.files}
    for source in missing:
        groups.setdefault(file_of(source), []).append(source)
    base = set(plan.checkpoint.files)
    return [subject for path, group in groups.items() for subject in ([path] * (path in base) + group)]


def file_of(subject: WorkItem) -> Path:
    """The file that a subject begins in, or is."""
    return subject if isinstance(subject, Path) else subject.stored[0].path


def destinations_of(written: Iterable[tuple[ArtifactPlan, ShardWriter]]) -> Destinations:
    """What is made from each source."""
    found: dict[int, list[Destination]] = {}
    for item, writer in written:
        for route in item.routes.values():
            found.setdefault(id(route.output.source), []).append(Destination(item, writer, route))
    return found


@dataclass(frozen=True)
class Workshop:
    """What all jobs of a process share."""

    plan: Plan
    destinations: Destinations
    files: SourceFiles
    digests: SourceDigests
    accelerator: Accelerator | None = None

    def opener(self, subject: WorkItem) -> Callable[[], StagedJob]:
        """What opens the job of a subject."""
        if isinstance(subject, Path):
            return partial(HashJob, self.digests, subject)
        destinations = self.destinations.get(id(subject), ())
        return partial(TensorJob, self.plan, subject, self.files, destinations, self.accelerator)
