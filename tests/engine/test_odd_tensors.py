"""Tensors that are no matrices, hold nothing, or break the alignment of what follows leave as they came."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_export.engine import BuildOptions, build
from qlora_export.planning.make import make_plan
from tests.helpers.files import folder_bytes
from tests.helpers.pico import RecipeMaker

ODD = {
    "mtp.scalar": torch.tensor(1.5),
    "mtp.empty": torch.zeros(0, 7, dtype=torch.bfloat16),
    "mtp.numbers": torch.arange(3),
    "mtp.bytes": torch.arange(5, dtype=torch.uint8),
    "mtp.flags": torch.tensor([True, False, True]),
    "mtp.weight": torch.linspace(-1, 1, 35, dtype=torch.bfloat16).reshape(5, 7),
}


def with_odd_tensors(base: Path) -> Path:
    path = base / "model.safetensors"
    tensors = load_file(path)
    save_file({**ODD, **tensors}, path, metadata={"format": "pt"})
    return base


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_they_are_carried_along(
    pico_recipe: RecipeMaker, base_copy: Path, adapter_copy: Path, tmp_path: Path, workers: int
) -> None:
    (adapter_copy / "qlora_export.json").unlink()
    base = with_odd_tensors(base_copy)
    recipe = pico_recipe("bf16", "nf4", "nf4-adapter", base=str(base), adapter=str(adapter_copy))
    build(make_plan(recipe, tmp_path / "out"), tmp_path / "out", BuildOptions(workers=workers))
    for name in ("bf16", "nf4", "nf4-adapter"):
        found = load_file(tmp_path / "out" / name / "model.safetensors")
        for tensor, expected in ODD.items():
            assert found[tensor].dtype == expected.dtype, (name, tensor)
            assert torch.equal(found[tensor], expected), (name, tensor)
        manifest = json.loads((tmp_path / "out" / name / "manifest.json").read_text())
        assert set(manifest["files"]) | {"manifest.json"} == set(folder_bytes(tmp_path / "out" / name))
