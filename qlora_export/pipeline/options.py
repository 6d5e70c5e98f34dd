"""What every verb of a run is told: where to write, what to take of the machine, how to show progress."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_export import engine
from qlora_export.engine import Engine
from qlora_export.types import Progress, Track


@contextmanager
def untracked(stage: str) -> Iterator[Progress]:
    """A track that shows nothing."""
    yield lambda done, total: None


@dataclass(frozen=True)
class RunOptions:
    """Where a run writes, what a build may take, and how it shows its progress.

    `keeps_plan` has a plan take the digests that a later run is held to, which come back as `pinned`;
    `publisher_environment` is what the environment of the publisher's process has beside ours.
    """

    out: Path
    workers: int = field(default_factory=lambda: engine.BuildOptions().workers)
    memory_limit_bytes: int | None = None
    track: Track = untracked
    publisher_environment: Mapping[str, str] = field(default_factory=dict)
    pinned: Mapping[str, Any] | None = None
    keeps_plan: bool = False
    engine: Engine = "threads"
    accelerator: str | None = None

    @property
    def device(self) -> str:
        """Where models run that are measured."""
        return self.accelerator or "cpu"
