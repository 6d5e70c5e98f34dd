"""One comparison on the pico model for all tests that look at one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from qlora_export.drift.comparison import speed
from qlora_export.drift.comparison.rows import Comparison
from qlora_export.pipeline.compare import compare
from qlora_export.pipeline.options import RunOptions
from qlora_export.recipe.config import Recipe
from qlora_export.recipe.load import make_recipe

FORMATS = ("fp32,bf16,int8", "nf4:nearest,nf4-adapter", "nf4:calibrated, w4a16")


@pytest.fixture
def compared_recipe(pico_base: Path, pico_adapter: Path, pico_text: Path) -> Recipe:
    return recipe_of(pico_base, pico_adapter, pico_text)


@pytest.fixture
def compared(pico_base: Path, pico_adapter: Path, pico_text: Path) -> Comparison:
    """Five formats that can be made of the pico model, and two that cannot."""
    return made(pico_base, pico_adapter, pico_text)


@functools.cache
def made(base: Path, adapter: Path, text: Path) -> Comparison:
    with timed_once():
        return compare(recipe_of(base, adapter, text), RunOptions(base.parent / "compared"), FORMATS)


@contextmanager
def timed_once() -> Iterator[None]:
    """No test of a whole comparison asks how near its times are to the least."""
    with mock.patch.multiple(speed, REPEATS=1, LEAST_SECONDS=0.0):
        yield


def recipe_of(base: Path, adapter: Path, text: Path) -> Recipe:
    drift = {"text": str(text), "limits": {"gain_kept": None}}
    data = {"base": str(base), "adapter": str(adapter), "artifacts": ["bf16"], "drift": drift}
    return make_recipe(data, Path(), "test")
