from __future__ import annotations

from pathlib import Path

import pytest

from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.release import check
from qlora_export.report.run import Run
from tests.helpers.compared import compared, compared_recipe
from tests.helpers.pico import RecipeMaker

__all__ = ["compared", "compared_recipe"]


@pytest.fixture(scope="session")
def checked(pico_recipe: RecipeMaker, pico_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An artifact that passes, and one that fails as expected."""
    nearest = {"format": "nf4", "name": "nf4", "rounding": "nearest", "expect": "fail"}
    drift = {"text": str(pico_text), "limits": {"gain_kept": None}}
    return check(pico_recipe("bf16", nearest, drift=drift), RunOptions(tmp_path_factory.mktemp("checked")))
