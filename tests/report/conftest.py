from __future__ import annotations

from pathlib import Path

import pytest

from qlora_export.pipeline import RunOptions, check
from qlora_export.recipe import make_recipe
from qlora_export.report.run import Run
from tests.compared import compared, compared_recipe

__all__ = ["compared", "compared_recipe"]


@pytest.fixture(scope="session")
def checked(pico_base: Path, pico_adapter: Path, pico_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An artifact that passes, and one that fails as expected."""
    nearest = {"format": "nf4", "name": "nf4", "rounding": "nearest", "expect": "fail"}
    data = {
        "base": str(pico_base),
        "adapter": str(pico_adapter),
        "artifacts": ["bf16", nearest],
        "drift": {"text": str(pico_text), "limits": {"gain_kept": None}},
    }
    return check(make_recipe(data, Path(), "test"), RunOptions(tmp_path_factory.mktemp("checked")))
