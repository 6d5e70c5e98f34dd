"""Positioned reads of row blocks: any rows of any stored tensor, from any thread, without a shared file position."""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from qlora_export.errors import InputError
from qlora_export.quant.floats import Float32, UInt8
from qlora_export.tensors.dtypes import ITEM_BYTES, widen
from qlora_export.tensors.header import StoredTensor

SHARED_TENSORS = 8
BLOCK_VALUES = 1 << 20
CANNOT_SAY = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
# Called by a thread that is about to wait for the disk.
BeforeWait = Callable[[], None]


def read_at(descriptor: int, view: memoryview, position: int, before_wait: BeforeWait) -> int:
    """Read into a view, and tell before it takes the disk; how many bytes came, 0 at the end of the file.

    A file system that cannot say whether a read will wait (tmpfs, for one) is read without telling.
    """
    try:
        done = os.preadv(descriptor, [view], position, os.RWF_NOWAIT)
    except BlockingIOError:
        before_wait()
    except OSError as error:
        if error.errno not in CANNOT_SAY:
            raise
    else:
        if done > 0:
            return done
    return os.preadv(descriptor, [view], position)


class SourceFiles:
    """Open source files by path; one descriptor each, closed together. `before_wait` is called where a read waits."""

    def __init__(self) -> None:
        self.before_wait: BeforeWait = lambda: None
        self._descriptors: dict[Path, int] = {}
        self._shared: OrderedDict[tuple[Path, int], Float32] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def drop(self, path: Path) -> None:
        """Leave nothing of a file in the page cache; it can still be read."""
        os.posix_fadvise(self._descriptor(path), 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self, tensor: StoredTensor, first_row: int, rows: int) -> UInt8:
        """Raw bytes of `rows` rows from `first_row` on, flat uint8."""
        row_bytes = tensor.spec.columns * ITEM_BYTES[tensor.spec.dtype]
        return self.read_bytes(tensor, first_row * row_bytes, rows * row_bytes)

    def read_bytes(self, tensor: StoredTensor, first: int, count: int) -> UInt8:
        """`count` raw bytes of a tensor from its byte `first` on."""
        out = np.empty(count, np.uint8)
        view, position = out.data, tensor.offset + first
        while view:
            done = read_at(self._descriptor(tensor.path), view, position, self.before_wait)
            if done == 0:
                raise InputError(
                    f"{tensor.path}: tensor {tensor.spec.name} ends early, at byte {position}",
                    "the file became shorter while it was read; restore it and run again",
                )
            view, position = view[done:], position + done
        return out

    def values(self, tensor: StoredTensor) -> Float32:
        """All values of a tensor as float32 in its shape."""
        raw = self.read(tensor, 0, tensor.spec.rows)
        return widen(raw, tensor.spec.dtype).reshape(tensor.spec.shape)

    def blocks(self, tensor: StoredTensor) -> Iterator[Float32]:
        """All values in order, flat, some rows at a time."""
        height = max(1, BLOCK_VALUES // max(tensor.spec.columns, 1))
        for first in range(0, tensor.spec.rows, height):
            yield widen(self.read(tensor, first, min(height, tensor.spec.rows - first)), tensor.spec.dtype)

    def shared_values(self, tensor: StoredTensor) -> Float32:
        """The same, kept for the next who asks: the factors of packed experts serve every expert. Not to be changed."""
        key = (tensor.path, tensor.offset)
        with self._lock:
            if key in self._shared:
                self._shared.move_to_end(key)
                return self._shared[key]
        values = self.values(tensor)
        values.flags.writeable = False
        with self._lock:
            self._shared[key] = values
            if len(self._shared) > SHARED_TENSORS:
                self._shared.popitem(last=False)
        return values

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                descriptor = self._descriptors[path] = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            return self._descriptors[path]


def same_values(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two stored tensors have the same shape and the same values."""
    if first.spec.shape != second.spec.shape:
        return False
    with SourceFiles() as files:
        pairs = zip(files.blocks(first), files.blocks(second), strict=True)
        return all(np.array_equal(one, other) for one, other in pairs)
