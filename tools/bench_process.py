"""Run whole processes and measure them: wall seconds, and resident memory as the kernel reports it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """Wall seconds and peak resident bytes of a process."""

    seconds: float
    resident_bytes: int


def cost(words: list[str], output: str = os.devnull) -> Cost:
    """Run a process and measure it."""
    started = time.perf_counter()
    flags = os.O_WRONLY | os.O_CREAT
    streams = [(os.POSIX_SPAWN_OPEN, 1, output, flags, 0o600), (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
    pid = os.posix_spawn(words[0], words, os.environ, file_actions=streams)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)}: ended with status {status}")
    return Cost(time.perf_counter() - started, usage.ru_maxrss * 1024)


def evict(folder: Path) -> None:
    """Bring a folder's files to the disk and out of the page cache."""
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
