"""The release of the embedded demo, and copies of it that are staged as for an upload."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_export.engine import BuildOptions, build, export
from qlora_export.planning.make import make_plan
from qlora_export.publish.staged_folder import Staged
from qlora_export.recipe.load import make_recipe
from tests.helpers.pico import DEMO
from tests.publish.lint_stage import (
    FORMATS,
    listed,
)


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's artifacts, every format, unmeasured; the correction of rounding is left at zero."""
    out = tmp_path_factory.mktemp("release")
    options = {"nf4-lowrank": {"rank": 2}}
    data = {
        "base": str(DEMO / "base"),
        "adapter": str(DEMO / "adapter"),
        "artifacts": [{"format": name, "options": options.get(name, {})} for name in FORMATS],
        "calibration": {"text": str(DEMO / "calibration.jsonl")},
    }
    plan = make_plan(make_recipe(data, Path(), "test"), out)
    made = {artifact.name: artifact for artifact in build(plan, out, BuildOptions())}
    for item in plan.exports:
        made[item.name] = export(plan, item, made.get(item.source_name), out)
    return out


@pytest.fixture
def stage(release: Path, tmp_path: Path) -> Callable[..., Staged]:
    """Stage artifacts by prefix, with files of the publisher beside them."""

    def make(**artifacts: str) -> Staged:
        folder = tmp_path / "staged"
        for prefix, name in artifacts.items():
            shutil.copytree(release / name, folder / prefix.replace("root", ""), dirs_exist_ok=True)
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nUse a token: hf_xxxxxxxxxxxxxxxxxxxxxxxx\n")
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        (folder / "qlora-export").mkdir()
        (folder / "qlora-export/report.json").write_text("{}\n")
        return listed(folder, *("" if prefix == "root" else f"{prefix}/" for prefix in artifacts))

    return make
