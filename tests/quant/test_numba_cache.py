"""Two processes that compile two signatures of a function at the same time leave a cache that names the right code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from numba.core import caching

FUNCTION = """
import numba
@numba.njit(cache=True)
def total(values):
    found = values[0] * 0
    for value in values:
        found += value
    return found
"""
# Compiles for a dtype; where it is told to, it waits between the index and the code until the other one has an index.
CALLER = """
import sys
import time
from pathlib import Path

import numpy as np
from numba.core import caching

import qlora_export.quant

dtype, waits = sys.argv[1:]
folder = Path.cwd()
(folder / f"started {dtype}").touch()
save_index = caching.IndexDataCacheFile._save_index


def slow(file, overloads):
    (folder / f"at the index {dtype}").touch()
    until = time.monotonic() + 3
    while time.monotonic() < until and len(list(folder.glob("at the index *"))) < 2:
        time.sleep(0.01)
    save_index(file, overloads)
    time.sleep(0.5 if dtype == "int64" else 0)


if waits == "yes":
    while len(list(folder.glob("started *"))) < 2:
        time.sleep(0.01)
    caching.IndexDataCacheFile._save_index = slow
from summing import total

print(total(np.array([1, 2, 3], dtype)))
"""


def call(folder: Path, dtype: str, waits: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", CALLER, dtype, waits]
    return subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True)


def test_the_methods_are_there_to_be_locked() -> None:
    assert all(hasattr(getattr(caching.IndexDataCacheFile, step), "__wrapped__") for step in ("save", "load"))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("order", [("float64", "int64"), ("int64", "float64")])
def test_a_cold_cache_is_filled_by_two_processes(tmp_path: Path, order: tuple[str, str]) -> None:
    (tmp_path / "summing.py").write_text(FUNCTION)
    expected = {"float64": "6.0", "int64": "6"}
    for waits in ("yes", "no"):
        running = {dtype: call(tmp_path, dtype, waits) for dtype in order}
        assert {dtype: process.communicate()[0].strip() for dtype, process in running.items()} == expected
