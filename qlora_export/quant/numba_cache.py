"""numba's cache of compiled functions, which one process at a time reads and writes.

numba 0.68 gives the machine code of each signature of a function the next free number, writes the index, then the code.
Two processes that compile two signatures at once on a cold cache take the same number: the index then names the code of
the other, and every later process computes with it, without a word (an int64 array summed as float64). So both steps
are done under a lock beside the index, and so is reading the two.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from numba.core import caching

STEPS = ("save", "load")


def lock_cache() -> None:
    """Let this process's numba save and load under the lock; once is enough."""
    kind = getattr(caching, "IndexDataCacheFile", None)
    for step in STEPS:
        method = getattr(kind, step, None)
        if method is not None and not hasattr(method, "__wrapped__"):
            setattr(kind, step, _alone(method))


def _alone(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def locked(file: Any, *arguments: Any) -> Any:
        with _lock(Path(f"{file._index_path}.lock")):
            return method(file, *arguments)

    return locked


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Alone, or at once where no lock can be made: nobody writes there."""
    try:
        held = path.open("ab")
    except OSError:
        yield
        return
    with held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
