"""The public interface: what `from qlora_export import ...` gives, and what it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import qlora_export
from qlora_export import Recipe, Run, RunOptions, build, check, load_recipe, plan, release
from tests.helpers.pico import RecipeMaker


def test_every_public_name_is_there() -> None:
    for name in qlora_export.__all__:
        assert getattr(qlora_export, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'merge_all'"):
        _ = qlora_export.merge_all


def test_the_verbs_stay_functions_after_everything_is_imported(pico_recipe: RecipeMaker, tmp_path: Path) -> None:
    run = build(pico_recipe("bf16"), RunOptions(tmp_path))
    assert isinstance(run, Run)
    assert isinstance(run.plan.recipe, Recipe)
    assert plan(pico_recipe("bf16"), RunOptions(tmp_path)).plan.artifacts[0].digest == run.plan.artifacts[0].digest
    assert all(callable(getattr(qlora_export, name)) for name in ("plan", "build", "check", "release", "load_recipe"))
    assert callable(check)
    assert callable(release)
    assert callable(load_recipe)


def test_the_bare_import_is_free() -> None:
    script = "import sys, qlora_export\nassert not {'numpy', 'torch', 'numba', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
