from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_export.tensors.reading import read_at

SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on the disk, and one of a file system that cannot say whether a read will wait."""
    if request.param == "disk":
        yield tmp_path
        return
    if not os.access(SHARED_MEMORY, os.W_OK):
        pytest.skip("no tmpfs to write to")
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as name:
        yield Path(name)


@pytest.mark.parametrize("cold", [False, True])
def test_every_byte_comes_and_a_wait_is_told(folder: Path, cold: bool) -> None:
    content = os.urandom(3_000_000)
    path = folder / "file"
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    if cold:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    waits: list[bool] = []
    found = bytearray(len(content) + 10)
    position = 0
    while done := read_at(descriptor, memoryview(found)[position:], position, lambda: waits.append(True)):
        position += done
    os.close(descriptor)
    assert found[:position] == content
    assert bool(waits) == (cold and not folder.is_relative_to(SHARED_MEMORY))


def test_what_is_no_file_is_an_error() -> None:
    read_end, write_end = os.pipe()
    with pytest.raises(OSError, match="Illegal seek"):
        read_at(read_end, memoryview(bytearray(4)), 0, lambda: None)
    os.close(read_end)
    os.close(write_end)
