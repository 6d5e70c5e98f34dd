"""Places at the processor that are free while a worker waits for the disk.

There are as many workers as there shall be at work. Who is about to wait lends its place: a spare thread does one task
on it, and sleeps again. Where everything is in the page cache nobody waits, and nobody is in the way.
"""

from __future__ import annotations

import threading


class SpareWorkers:
    """Places that are free, `most` at the same time, until it is closed."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._free = 0
        self._closed = False
        self._changed = threading.Condition()

    def lend(self) -> None:
        """A worker is about to wait for the disk."""
        with self._changed:
            self._free = min(self._free + 1, self.most)
            self._changed.notify()

    def take(self) -> bool:
        """Wait for a free place and take it; False when there will be none any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed)
            if self._closed:
                return False
            self._free -= 1
            return True

    def close(self) -> None:
        """No more places."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
