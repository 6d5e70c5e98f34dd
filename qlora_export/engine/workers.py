"""A pool of threads that takes tensors through their stages without waiting for each other.

A tensor is opened, its blocks are observed, it settles, its blocks are encoded, it is sealed. The thread that finishes
the last block of a stage opens the next one, so nobody waits at a barrier; a few tensors are open at a time, which
bounds the memory. The first error stops the pool and is raised in the caller. numpy and numba release the interpreter
lock, so threads suffice and share the page cache and the JIT.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from qlora_export.engine.spare_workers import SpareWorkers
from qlora_export.engine.tensor_job import RowBlock


class StagedJob(Protocol):
    """What the pool needs to know of a tensor's work."""

    @property
    def blocks(self) -> Sequence[RowBlock]:
        """All row blocks."""
        ...

    @property
    def observes(self) -> bool:
        """Whether there is a first pass."""
        ...

    def observe(self, block: RowBlock) -> None:
        """First pass over one block."""
        ...

    def settle(self) -> None:
        """End of the first pass."""
        ...

    def encode(self, block: RowBlock) -> None:
        """Second pass over one block."""
        ...

    def seal(self) -> None:
        """End of the second pass."""
        ...


class _Countdown:
    """Tells the last of `count` callers that it was the last."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._lock = threading.Lock()

    def last(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left == 0


class WorkerPool:
    """Runs jobs on `workers` threads; `finished` is called once for every job, by the thread that ended it.

    Spare threads do tasks while workers wait for the disk, as many as there may be `vacancies`.
    """

    def __init__(self, workers: int, finished: Callable[[int], None], vacancies: SpareWorkers | None = None) -> None:
        self._workers = workers
        self._finished = finished
        self._vacancies = vacancies or SpareWorkers(0)
        self._tasks: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._open = 0
        self._error: BaseException | None = None
        self._openers: Iterator[tuple[int, Callable[[], StagedJob]]] = iter(())
        self._exhausted = False

    def run(self, openers: Sequence[Callable[[], StagedJob]]) -> None:
        """Open and finish all jobs in about this order; raises the first error of any thread."""
        self._openers = iter(list(enumerate(openers)))
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._workers)]
        spares = [threading.Thread(target=self._help, daemon=True) for _ in range(self._vacancies.most)]
        for thread in [*threads, *spares]:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._vacancies.close()
            for thread in [*threads, *spares]:
                thread.join()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (task := self._next(waits=True)) is not None:
            self._do(task)

    def _help(self) -> None:
        while self._vacancies.take():
            if (task := self._next(waits=False)) is not None:
                self._do(task)

    def _do(self, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
            self._fail(error)

    def _next(self, waits: bool) -> Callable[[], None] | None:
        """The next block of an open tensor, else a new tensor; None when all is done or failed, or none is ready."""
        with self._changed:
            while self._error is None:
                if self._tasks:
                    return self._tasks.popleft()
                if self._open < self._workers + 1 and not self._exhausted:
                    opener = next(self._openers, None)
                    if opener is not None:
                        self._open += 1
                        number, make = opener
                        return lambda: self._start(number, make())
                    self._exhausted = True
                if self._open == 0 and self._exhausted:
                    self._changed.notify_all()
                    return None
                if not waits:
                    return None
                self._changed.wait()
            return None

    def _start(self, number: int, job: StagedJob) -> None:
        if job.observes:
            self._stage(job.blocks, job.observe, lambda: self._encode(number, job))
        else:
            self._encode(number, job)

    def _encode(self, number: int, job: StagedJob) -> None:
        job.settle()
        self._stage(job.blocks, job.encode, lambda: self._close(number, job))

    def _close(self, number: int, job: StagedJob) -> None:
        job.seal()
        self._finished(number)
        with self._changed:
            self._open -= 1
            self._changed.notify_all()

    def _stage(self, blocks: Sequence[RowBlock], step: Callable[[RowBlock], None], then: Callable[[], None]) -> None:
        """Queue one step over all blocks; whoever does the last one goes on with `then`."""
        if not blocks:
            then()
            return
        countdown = _Countdown(len(blocks))

        def task(block: RowBlock) -> None:
            step(block)
            if countdown.last():
                then()

        with self._changed:
            self._tasks.extend([_bind(task, block) for block in blocks])
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


def _bind(task: Callable[[RowBlock], None], block: RowBlock) -> Callable[[], None]:
    return lambda: task(block)
