"""How a build runs; none of it changes a byte."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from qlora_export.planning.memory import spare_threads
from qlora_export.types import Progress

Engine = Literal["threads", "ray"]


@dataclass(frozen=True)
class BuildOptions:
    """Threads, limits, and who is told bytes done and bytes in all.

    The engine `ray` has as many processes on a cluster where `threads` has threads, and a limit of memory for each.
    `checkpoint_bytes` of the base may be read again after a kill. `memory_limit_bytes` is for resident memory: fewer
    threads run where that keeps it. A build that moves more than `cache_bytes` leaves nothing in the page cache, for
    whatever else runs there; a smaller one leaves it all, for the check that follows. `accelerator` is the torch device
    that computes, None for the processor.
    """

    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    checkpoint_bytes: int = 256_000_000
    progress: Progress = lambda done, total: None
    memory_limit_bytes: int | None = None
    cache_bytes: int = field(default_factory=lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    engine: Engine = "threads"
    accelerator: str | None = None

    @property
    def spares(self) -> int:
        """Threads that go on while workers wait for the disk."""
        return spare_threads(self.workers)

    @property
    def threads(self) -> int:
        """Threads of this process."""
        return self.workers if self.engine == "threads" else min(self.workers, len(os.sched_getaffinity(0)))
