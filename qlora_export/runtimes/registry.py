"""Runtimes by name, made only when they are asked for."""

from __future__ import annotations

from typing import cast

from qlora_export.catalog import RUNTIMES, load
from qlora_export.runtimes.base import Runtime


def load_runtime(name: str) -> Runtime:
    """The runtime of that name."""
    return cast(Runtime, load(RUNTIMES, "runtime", name)())
