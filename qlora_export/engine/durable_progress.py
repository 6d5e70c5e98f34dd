"""What is finished reaches the disk and the journals, in a thread of its own, so that no worker waits for the disk.

A tensor enters the journals when its bytes are synced and the digest of its source file stands there; until then a run
that is killed makes it again. Whoever finishes a tensor while twice the agreed bytes are waiting waits, too: so much
may be lost, and no more. The first error is raised where the pass next looks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from qlora_export.engine.partial_folder import PartialFolder


class Checkpoints:
    """Syncs and journals tensors by name, about `bytes_each` at a time.

    `listed` says whether the digest of a tensor's source is in the journals, `drops` that the page cache keeps nothing.
    """

    def __init__(
        self, folders: Sequence[PartialFolder], bytes_each: int, listed: Callable[[str], bool], drops: bool
    ) -> None:
        self._folders = folders
        self._bytes_each = bytes_each
        self._listed = listed
        self._drops = drops
        self._finished: list[str] = []
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if error is None:
            self._raise()

    def add(self, tensor: str, size: int) -> None:
        """All bytes of a tensor were written; raises what went wrong before."""
        with self._changed:
            self._finished.append(tensor)
            self._waiting_bytes += size
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._error is not None or self._waiting_bytes < 2 * self._bytes_each)
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        unlisted: list[str] = []
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or self._waiting_bytes >= self._bytes_each)
                    closing = self._closing
                    taken, self._finished, self._waiting_bytes = self._finished, [], 0
                    self._changed.notify_all()
                unlisted = self._save([*unlisted, *taken])
                if closing:
                    self._drop()
                    return
        except BaseException as error:  # noqa: BLE001  raised again in the thread that runs the pass
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _drop(self) -> None:
        for folder in self._folders if self._drops else ():
            folder.writer.drop()

    def _save(self, tensors: Sequence[str]) -> list[str]:
        """Sync and journal; the tensors whose source is not listed yet."""
        if not tensors:
            return []
        for folder in self._folders:
            folder.writer.sync()
        self._drop()
        ready = [name for name in tensors if self._listed(name)]
        for folder in self._folders:
            folder.journal.add(ready)
        written = set(ready)
        return [name for name in tensors if name not in written]
