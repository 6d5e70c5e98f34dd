"""vLLM's own config classes read config.json of every folder that it is said to serve, and skip what is kept dense.

vLLM pins another torch and another transformers, so it has an environment of its own, which QLORA_EXPORT_VLLM_PYTHON
names; docs/formats.md tells how to make one. No GPU is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qlora_export.catalog import FORMATS
from qlora_export.engine import BuildOptions, build
from qlora_export.planning.make import make_plan
from qlora_export.recipe.load import make_recipe
from tests.helpers.pico import save_adapter, save_base

PYTHON = os.environ.get("QLORA_EXPORT_VLLM_PYTHON")
READER = Path(__file__).parent / "vllm_reader.py"
SCHEMES = {
    "w4a16": ("CompressedTensorsConfig", "wna16"),
    "w8a16": ("CompressedTensorsConfig", "wna16"),
    "w8a8": ("CompressedTensorsConfig", "int8"),
    "fp8": ("CompressedTensorsConfig", "fp8"),
    "fp8-block": ("CompressedTensorsConfig", "fp8"),
    "nvfp4a16": ("CompressedTensorsConfig", "nvfp4"),
    "mxfp4a16": ("CompressedTensorsConfig", "mxfp4"),
    "gptq": ("AutoGPTQConfig", "uint4b8 in groups of 128"),
    "awq": ("AutoAWQConfig", "uint4 in groups of 128"),
}


def test_every_served_format_is_asked_for() -> None:
    assert set(SCHEMES) == {
        name for name, info in FORMATS.items() if info.served_by_vllm and info.base_model_relation == "quantized"
    }


@pytest.mark.vllm
def test_vllm_reads_what_is_stated(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", seed=1, hidden_size=128, intermediate_size=256)
    adapter = save_adapter(base, tmp_path / "adapter", seed=2)
    artifacts: list[dict[str, Any]] = [{"format": name, "keep": ["*.0.mlp.down_proj"]} for name in SCHEMES]
    recipe = make_recipe({"base": str(base), "adapter": str(adapter), "artifacts": artifacts}, Path(), "test")
    built = build(make_plan(recipe, tmp_path / "out"), tmp_path / "out", BuildOptions())
    folders = {str(artifact.path): artifact.name for artifact in built}
    variables = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_TARGET_DEVICE": "cpu"}
    found = subprocess.run(
        [str(PYTHON), str(READER), *folders], env=variables, check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert found.returncode == 0, found.stderr[-2000:]
    read = json.loads(found.stdout.splitlines()[-1])
    assert {folders[path]: (facts["class"], facts["scheme"]) for path, facts in read.items()} == SCHEMES
    layers = ["0.self_attn.qkv_proj", "0.self_attn.o_proj", "0.mlp.gate_up_proj", "1.mlp.down_proj"]
    for path, facts in read.items():
        assert facts["quantised"] == [f"model.layers.{name}" for name in layers], folders[path]
