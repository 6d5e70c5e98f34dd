"""Workers on a ray cluster: each says that it is ready, then makes one batch after another; who dies is replaced.

Workers are actors of one CPU each, spread over the nodes: they keep the plan and the open files from batch to batch. A
batch whose worker died goes to the next one that is free, on whatever node. Imported only where ray is installed.
"""

from __future__ import annotations

import pickle
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import RayError, RayTaskError

from qlora_export.artifact import FileFacts
from qlora_export.engine.manifest import versions
from qlora_export.engine.ray.batch_worker import Assignment, BatchWorker
from qlora_export.engine.ray.batches import Batch
from qlora_export.errors import EnvironmentProblem, ExportError

LOOK_SECONDS = 0.2
START_SECONDS = 300.0
STOP_SECONDS = 5.0
DEATHS_ALLOWED = 3


@dataclass(frozen=True)
class Request:
    """What a worker was asked: to make a batch, or, without one, to open."""

    worker: Any
    batch: Batch | None


class Crew:
    """At most `workers` actors for the batches of an assignment; all are dead when the context ends."""

    def __init__(self, assignment: Assignment, batches: Sequence[Batch], workers: int) -> None:
        self._hire = ray.remote(num_cpus=1, max_restarts=0, scheduling_strategy="SPREAD")(BatchWorker).remote
        self._arguments = (versions(), ray.put(pickle.dumps(assignment)))
        self._workers = workers
        self._queue = deque(batches)
        self._idle: list[Any] = []
        self._asked: dict[Any, Request] = {}
        self._deaths: Counter[Batch | None] = Counter()
        self._heard = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in [*self._idle, *(question.worker for question in self._asked.values())]:
            ray.kill(worker)
        if self._asked:
            ray.wait([*self._asked], num_returns=len(self._asked), timeout=STOP_SECONDS)

    def run(self, made: Callable[[Batch, FileFacts], None]) -> None:
        """Have every batch made and tell of each; raises the first error of any worker as it was raised there."""
        while self._left:
            self._put_to_work()
            answered, _ = ray.wait([*self._asked], timeout=LOOK_SECONDS)
            for answer in answered:
                self._take(answer, made)
            self._require_life()

    @property
    def _left(self) -> int:
        """Batches that are not made."""
        return len(self._queue) + sum(question.batch is not None for question in self._asked.values())

    def _put_to_work(self) -> None:
        """Give every idle worker a batch, and hire as many as there is work for."""
        while self._queue and self._idle:
            worker, batch = self._idle.pop(), self._queue.popleft()
            self._asked[worker.make.remote(batch)] = Request(worker, batch)
        while len(self._asked) + len(self._idle) < min(self._workers, self._left):
            worker = self._hire(*self._arguments)
            self._asked[worker.open.remote()] = Request(worker, None)

    def _take(self, answer: Any, made: Callable[[Batch, FileFacts], None]) -> None:
        question = self._asked.pop(answer)
        self._heard = time.monotonic()
        try:
            value = ray.get(answer)
        except RayTaskError as error:
            self._idle.append(question.worker)
            raise _cause(error) from None
        except RayError as error:
            self._bury(question, error)
            return
        self._idle.append(question.worker)
        self._put_to_work()
        if question.batch is None:
            self._deaths[None] = 0
        else:
            made(question.batch, value)

    def _bury(self, question: Request, error: RayError) -> None:
        """Give the batch of a dead worker to another; raises EnvironmentProblem where too many died of it."""
        with suppress(RayError):
            ray.kill(question.worker)
        self._deaths[question.batch] += 1
        reason = str(error).strip().splitlines()[-1].strip()
        if question.batch is not None:
            self._queue.appendleft(question.batch)
            if self._deaths[question.batch] > DEATHS_ALLOWED:
                raise EnvironmentProblem(
                    f"{self._deaths[question.batch]} workers died over the same tensors; the last: {reason}",
                    "look at the memory of the nodes (`ray status`, the logs of the raylets), then run again",
                )
        elif self._deaths[None] > DEATHS_ALLOWED + self._workers:
            raise EnvironmentProblem(
                f"no worker starts on the cluster; the last: {reason}",
                "install the same qlora-export with its extra ray on every node",
            )

    def _require_life(self) -> None:
        working = any(question.batch is not None for question in self._asked.values())
        if not working and time.monotonic() - self._heard > START_SECONDS:
            raise EnvironmentProblem(
                f"no worker could start in {START_SECONDS:.0f} seconds: the cluster has no CPU free for one",
                "`ray status` shows the nodes; add one, or wait for whoever uses them, and run again",
            )


def _cause(error: RayTaskError) -> Exception:
    """What was raised in the worker; where it is no error of ours, with a note of where it was raised."""
    cause = error.cause
    if isinstance(cause, ExportError | OSError):
        return cause
    if not isinstance(cause, Exception):
        return RuntimeError(str(error))
    cause.add_note(str(error))
    return cause
