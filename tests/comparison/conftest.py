from __future__ import annotations

from pathlib import Path

import pytest

from qlora_export.comparing import compare
from qlora_export.comparison.rows import Comparison
from qlora_export.pipeline import RunOptions
from qlora_export.recipe import Recipe, make_recipe

FORMATS = ("fp32,bf16,int8", "nf4:nearest,nf4-adapter", "nf4:calibrated, w4a16")


@pytest.fixture(scope="session")
def compared_recipe(pico_base: Path, pico_adapter: Path, pico_text: Path) -> Recipe:
    drift = {"text": str(pico_text), "limits": {"gain_kept": None}}
    data = {"base": str(pico_base), "adapter": str(pico_adapter), "artifacts": ["bf16"], "drift": drift}
    return make_recipe(data, Path(), "test")


@pytest.fixture(scope="session")
def compared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compared")


@pytest.fixture(scope="session")
def compared(compared_recipe: Recipe, compared_folder: Path) -> Comparison:
    """Five formats that can be made of the pico model, and two that cannot."""
    return compare(compared_recipe, RunOptions(compared_folder), FORMATS)
