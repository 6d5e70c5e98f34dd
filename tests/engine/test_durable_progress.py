"""Journals and the page cache, by what they hold while a pass is under way."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_export.engine import BuildOptions, build
from qlora_export.engine.durable_progress import Checkpoints
from qlora_export.engine.journal import Journal
from qlora_export.planning.make import make_plan
from tests.helpers.pico import RecipeMaker


class Writer:
    """A disk that syncs when it is let."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.syncs = 0
        self.error: OSError | None = None

    def sync(self) -> None:
        assert self.free.wait(20)
        self.syncs += 1
        if self.error is not None:
            raise self.error


class Folder:
    """A partial folder with a journal and that disk."""

    def __init__(self, path: Path) -> None:
        self.journal = Journal(path, "plan")
        self.writer: Any = Writer()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Any]:
    found = Folder(tmp_path)
    yield found
    found.writer.free.set()


def test_workers_go_on_while_the_disk_is_busy_and_wait_when_too_much_is_at_stake(folder: Any) -> None:
    done: list[str] = []

    def work() -> None:
        for name in "abcdefghijkl":
            checkpoints.add(name, 10)
            done.append(name)

    with Checkpoints([folder], 20, lambda name: True, drops=False) as checkpoints:
        worker = threading.Thread(target=work)
        worker.start()
        worker.join(0.5)
        assert worker.is_alive(), "one batch is on its way and two wait: more must not"
        assert 3 <= len(done) < 8
        assert not folder.journal.finished
        folder.writer.free.set()
        worker.join(20)
        assert not worker.is_alive()
    assert folder.journal.finished == set("abcdefghijkl")


def test_a_tensor_is_listed_only_after_its_source(folder: Any) -> None:
    listed: set[str] = set()
    folder.writer.free.set()
    with Checkpoints([folder], 1, listed.__contains__, drops=False) as checkpoints:
        checkpoints.add("early", 1)
        checkpoints.add("late", 1)
        assert "early" not in folder.journal.finished
        listed |= {"early"}
    assert folder.journal.finished == {"early"}


def test_a_disk_that_fails_is_raised_to_the_worker(folder: Any) -> None:
    folder.writer.error = OSError(28, "No space left on device")
    folder.writer.free.set()

    def fill(checkpoints: Checkpoints) -> None:
        for _ in range(100):
            checkpoints.add("tensor", 100)

    with pytest.raises(OSError, match="No space left"), Checkpoints([folder], 1, lambda name: True, False) as found:
        fill(found)
    assert not folder.journal.finished


def cached_bytes(path: Path) -> int:
    """How much of a file the page cache holds, as mincore tells."""
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        pages = -(-size // mmap.PAGESIZE)
        vector = (ctypes.c_ubyte * pages)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), vector) == 0
        return sum(page & 1 for page in vector) * mmap.PAGESIZE


@pytest.mark.parametrize("cache_bytes", [0, 1 << 60])
def test_a_large_build_leaves_nothing_in_the_page_cache(
    pico_recipe: RecipeMaker, base_copy: Path, tmp_path: Path, cache_bytes: int
) -> None:
    source = base_copy / "model.safetensors"
    os.sync()
    build(
        make_plan(pico_recipe("bf16", base=str(base_copy)), tmp_path / "out"),
        tmp_path / "out",
        BuildOptions(cache_bytes=cache_bytes, checkpoint_bytes=1),
    )
    cached = [cached_bytes(path) for path in (source, tmp_path / "out/bf16/model.safetensors")]
    if cache_bytes:
        assert cached[0] >= source.stat().st_size
    else:
        assert cached == [0, 0]
