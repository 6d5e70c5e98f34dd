"""The garbage collector, kept from looking through the modules and the plan again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_pause() -> Iterator[None]:
    """Spare the collector whatever is there already."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
