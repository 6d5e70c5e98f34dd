"""The model builder with weights kept in files writes the bytes that it writes without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from qlora_export.exporters.onnx.options import Int8Options, IntegerOptions
from tests.helpers.pico import save_base

EXCLUDED = "/model/layers.0/mlp/up_proj/MatMul"
INTEGERS: list[tuple[str, Any]] = [
    ("untied", IntegerOptions(sensitive_layers="int8", symmetric=False)),
    ("tied", IntegerOptions(last_matrix="int4", sensitive_layers="int8")),
    ("tied", IntegerOptions(algorithm="rtn", symmetric=False, exclude=EXCLUDED)),
    ("untied", IntegerOptions(algorithm="k_quant", last_matrix="int4", sensitive_layers="int8", block_size=16)),
    ("tied", Int8Options(provider="cuda")),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases, in shards, and every case built both ways by one process."""
    folder = tmp_path_factory.mktemp("built")
    for name, tied in (("untied", False), ("tied", True)):
        save_base(folder / name, 3, shard="80KB", vocab_size=512, intermediate_size=128, tie_word_embeddings=tied)
        assert len(list((folder / name).glob("*.safetensors"))) > 1
    cases: list[Any] = [(str(folder / "tied"), "fp32", "cpu", ()), (str(folder / "untied"), "fp16", "cuda", ())]
    for base, options in INTEGERS:
        precision = "int4" if isinstance(options, IntegerOptions) else "int8"
        cases.append((str(folder / base), precision, options.provider, options.words()))
    words = [sys.executable, "-P", "-m", "tests.exporters.both_builders", json.dumps(cases), str(folder)]
    here = {"PYTHONPATH": str(Path(__file__).parents[2])}
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "GIT_DIR": os.devnull}
    found = subprocess.run(words, check=False, capture_output=True, text=True, env={**os.environ, **here, **quiet})
    assert found.returncode == 0, found.stderr
    return folder


@pytest.mark.parametrize("number", range(2 + len(INTEGERS)))
def test_graph_and_data_are_those_of_the_plain_builder(built: Path, number: int) -> None:
    """Codes, scales, zero points, names and attributes among them."""
    plain, ours = (built / kind / str(number) for kind in ("plain", "ours"))
    files = sorted(path.name for path in plain.iterdir())
    assert {"model.onnx", "model.onnx.data"} <= set(files)
    assert files == sorted(path.name for path in ours.iterdir())
    for name in files:
        assert (plain / name).read_bytes() == (ours / name).read_bytes(), name


def test_sensitive_layers_have_8_bits_beside_a_head_of_4(built: Path) -> None:
    number = 2 + INTEGERS.index(("tied", IntegerOptions(last_matrix="int4", sensitive_layers="int8")))
    model = onnx.load(built / "ours" / str(number) / "model.onnx", load_external_data=False)
    names = {node.name for node in model.graph.node if node.op_type == "MatMulNBits"}
    assert {
        "/lm_head/MatMul_Q4",
        "/model/layers.0/mlp/down_proj/MatMul_Q8",
        "/model/layers.0/mlp/up_proj/MatMul_Q4",
    } <= names
    assert "GatherBlockQuantized" in {node.op_type for node in model.graph.node}
