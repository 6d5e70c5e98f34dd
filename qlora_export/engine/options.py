"""How a build runs; none of it changes a byte."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from qlora_export.contracts import Progress


@dataclass(frozen=True)
class BuildOptions:
    """Threads, how much of the base may be read again after a kill, and who is told bytes done and bytes in all."""

    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    checkpoint_bytes: int = 256_000_000
    progress: Progress = lambda done, total: None
