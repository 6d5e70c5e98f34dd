"""One run folder with a graph in float32 and one in integers, and ways to spoil copies of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from qlora_export.pipeline.options import RunOptions
from qlora_export.pipeline.release import build
from qlora_export.recipe.load import make_recipe

Spoil = Callable[[Callable[[Any], None]], Path]


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory, pico_base: Path, pico_adapter: Path) -> Path:
    """The run folder of bf16 and w4a16, each with its graph."""
    out = tmp_path_factory.mktemp("graphs")
    packed = {"name": "w4a16", "options": {"group_size": 32}, "keep": ["*.down_proj"]}
    artifacts = [
        "bf16",
        "onnx-fp32",
        {"format": "w4a16", "rounding": "nearest", **packed},
        {"format": "onnx-int4", "rounding": "nearest", "name": "onnx-int4"},
    ]
    data = {"base": str(pico_base), "adapter": str(pico_adapter), "artifacts": artifacts}
    build(make_recipe(data, Path(), "test"), RunOptions(out))
    return out


@pytest.fixture
def copied(graphs: Path, tmp_path: Path) -> Path:
    """A copy of the graph in float32, without our manifest."""
    folder = Path(shutil.copytree(graphs / "onnx-fp32", tmp_path / "copied"))
    (folder / "manifest.json").unlink()
    return folder


@pytest.fixture
def spoiled(copied: Path) -> Spoil:
    """A copy whose graph was changed."""

    def change(edit: Callable[[Any], None]) -> Path:
        model = onnx.load(copied / "model.onnx", load_external_data=False)
        edit(model)
        (copied / "model.onnx").write_bytes(model.SerializeToString())
        return copied

    return change
