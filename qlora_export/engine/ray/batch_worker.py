"""One process of many, perhaps on another machine: opened once, then asked to make one batch after another.

    driver:  lock, partial folders, headers, journals, digests, manifest, rename
    worker:  positioned writes of parts into the files that the driver made, synced before it answers

Bytes depend on the plan and the sources alone, so a batch may be made again by anyone, even while whoever was taken for
dead is still at it. Nothing here knows what carries questions and answers.
"""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qlora_export.artifact import FileFacts
from qlora_export.engine.gc_pause import gc_pause
from qlora_export.engine.journal import marked
from qlora_export.engine.manifest import versions
from qlora_export.engine.ray.batches import Batch
from qlora_export.engine.source_digests import SourceDigests
from qlora_export.engine.work_items import WorkItem, Workshop, destinations_of
from qlora_export.engine.workers import WorkerPool
from qlora_export.errors import EnvironmentProblem
from qlora_export.planning.plan import Plan
from qlora_export.tensors.reading import SourceFiles
from qlora_export.tensors.writing import ShardWriter

SHARED = "every node must have the base, the adapter and --out under the same paths, on a file system they share"


@dataclass(frozen=True)
class Assignment:
    """What a worker needs beside the shared file system; one pickle, in which subjects and routes are the same weights.

    `folders` are the partial folders by artifact, `mark` stands in their journals, `sizes` are those of all sources.
    """

    plan: Plan
    subjects: Sequence[WorkItem]
    folders: Mapping[str, Path]
    mark: str
    sizes: Mapping[Path, int]
    working_folder: Path


def assign(plan: Plan, subjects: Sequence[WorkItem], folders: Mapping[str, Path], mark: str) -> Assignment:
    """The assignment of all workers of a run."""
    sizes = {path.absolute(): path.stat().st_size for path in _source_files(plan)}
    places = {name: folder.absolute() for name, folder in folders.items()}
    return Assignment(plan, subjects, places, mark, sizes, Path.cwd())


class BatchWorker:
    """Makes batches of a pickled assignment; `expected` are the versions of the driver."""

    def __init__(self, expected: Mapping[str, str], pickled: bytes) -> None:
        self._expected = expected
        self._pickled = pickled

    def open(self) -> str:
        """Look whether this node has all that is needed, and open it; the name of the node."""
        node = socket.gethostname()
        for name, version in versions().items():
            if version != self._expected[name]:
                raise EnvironmentProblem(
                    f"node {node}: {name} {version}, the driver has {self._expected[name]}",
                    "install the same versions on every node: bytes may depend on them",
                )
        assignment: Assignment = pickle.loads(self._pickled)  # noqa: S301  the driver's own, by way of its cluster
        with suppress(FileNotFoundError):
            os.chdir(assignment.working_folder)
        require_visible(assignment, node)
        self._plan = assignment.plan
        self._subjects = assignment.subjects
        items = [item for item in assignment.plan.artifacts if item.name in assignment.folders]
        self._writers = [ShardWriter(assignment.folders[item.name], item.layout, joins=True) for item in items]
        self._destinations = destinations_of(zip(items, self._writers, strict=True))
        self._files = SourceFiles()
        return node

    def make(self, batch: Batch) -> FileFacts:
        """Make the subjects of these numbers and sync what was written; size and sha256 of the files among them."""
        digests = SourceDigests(())
        workshop = Workshop(self._plan, self._destinations, self._files, digests)
        chosen = [self._subjects[number] for number in batch]
        with gc_pause():
            WorkerPool(1, lambda number: None).run([workshop.opener(subject) for subject in chosen])
        if not all(isinstance(subject, Path) for subject in chosen):
            for writer in self._writers:
                writer.sync()
        return digests.facts


def require_visible(assignment: Assignment, node: str) -> None:
    """Raise EnvironmentProblem unless this node has the driver's sources and its partial folders."""
    for path, size in assignment.sizes.items():
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            raise EnvironmentProblem(f"node {node}: {path} is not there", SHARED)
        if found != size:
            raise EnvironmentProblem(f"node {node}: {path} has {found} bytes, the driver sees {size}", SHARED)
    for folder in assignment.folders.values():
        if not folder.is_dir():
            raise EnvironmentProblem(f"node {node}: {folder} is not there", SHARED)
        if not marked(folder, assignment.mark):
            raise EnvironmentProblem(f"node {node}: {folder} is another folder than the driver's", SHARED)


def _source_files(plan: Plan) -> Iterator[Path]:
    """Every file that weights or changes are read from."""
    found = dict.fromkeys(plan.checkpoint.files)
    for source in plan.sources:
        found |= dict.fromkeys(tensor.path for tensor in source.stored)
    for output in plan.model.outputs.values():
        found |= dict.fromkeys(tensor.path for change in output.changes for tensor in change.tensors)
    yield from found
