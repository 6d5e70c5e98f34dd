from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest

from qlora_export.engine.spare_workers import SpareWorkers
from qlora_export.engine.tensor_job import RowBlock
from qlora_export.engine.workers import StagedJob, WorkerPool


class Counting:
    """A job that checks the order of its stages."""

    def __init__(self, blocks: int, observes: bool, log: list[str]) -> None:
        self.blocks = [RowBlock(number, 1) for number in range(blocks)]
        self.observes = observes
        self.log = log
        self.seen: list[str] = []
        self._lock = threading.Lock()

    def observe(self, block: RowBlock) -> None:
        with self._lock:
            assert "settle" not in self.seen
            self.seen.append("observe")

    def settle(self) -> None:
        assert self.seen.count("observe") == (len(self.blocks) if self.observes else 0)
        self.seen.append("settle")

    def encode(self, block: RowBlock) -> None:
        with self._lock:
            assert "settle" in self.seen
            self.seen.append("encode")

    def seal(self) -> None:
        assert self.seen.count("encode") == len(self.blocks)
        self.seen.append("seal")
        self.log.append("sealed")


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_every_job_passes_every_stage_in_order(workers: int) -> None:
    log: list[str] = []
    finished: list[int] = []
    makers: list[Callable[[], StagedJob]] = [
        partial(Counting, blocks, observes, log) for blocks in (0, 1, 2, 13, 40) for observes in (True, False)
    ]
    WorkerPool(workers, finished.append).run(makers)
    assert sorted(finished) == list(range(len(makers)))
    assert len(log) == len(makers)


@pytest.mark.parametrize("stage", ["observe", "settle", "encode", "seal"])
def test_the_first_error_stops_the_pool_and_is_raised(stage: str) -> None:
    def make(number: int) -> StagedJob:
        job = Counting(3, True, [])
        if number == 2:

            def fail(*arguments: object) -> None:
                raise ArithmeticError("broken")

            setattr(job, stage, fail)
        return job

    with pytest.raises(ArithmeticError, match="broken"):
        WorkerPool(2, lambda number: None).run([partial(make, number) for number in range(50)])


def test_few_jobs_are_open_at_a_time() -> None:
    opened: list[int] = []
    finished: list[int] = []

    def make(number: int) -> StagedJob:
        opened.append(number)
        assert len(opened) - len(finished) <= 3 + 1
        return Counting(5, True, [])

    WorkerPool(3, finished.append).run([partial(make, number) for number in range(40)])
    assert len(finished) == 40


def test_a_place_is_used_while_its_worker_waits_for_the_disk() -> None:
    vacancies = SpareWorkers(1)
    elsewhere = threading.Event()
    threads: set[int] = set()

    class Reading(Counting):
        def encode(self, block: RowBlock) -> None:
            threads.add(threading.get_ident())
            if block.first == 0:
                vacancies.lend()
                assert elsewhere.wait(20), "nobody else took the next block"
            else:
                elsewhere.set()
            super().encode(block)

    WorkerPool(1, lambda number: None, vacancies).run([partial(Reading, 2, False, [])])
    assert len(threads) == 2


def test_nobody_helps_where_nobody_waits() -> None:
    threads: set[int] = set()

    class Busy(Counting):
        def encode(self, block: RowBlock) -> None:
            threads.add(threading.get_ident())
            super().encode(block)

    WorkerPool(1, lambda number: None, SpareWorkers(3)).run([partial(Busy, 50, True, []) for _ in range(5)])
    assert len(threads) == 1


def test_places_are_not_saved_up() -> None:
    vacancies = SpareWorkers(2)
    for _ in range(10):
        vacancies.lend()
    assert vacancies.take()
    assert vacancies.take()
    vacancies.close()
    assert not vacancies.take()


def test_an_error_of_a_spare_thread_is_raised() -> None:
    vacancies = SpareWorkers(1)
    failed = threading.Event()

    class Failing(Counting):
        def encode(self, block: RowBlock) -> None:
            if block.first == 0:
                vacancies.lend()
                assert failed.wait(20)
            else:
                failed.set()
                raise ArithmeticError("broken")

    with pytest.raises(ArithmeticError, match="broken"):
        WorkerPool(1, lambda number: None, vacancies).run([partial(Failing, 2, False, [])])
