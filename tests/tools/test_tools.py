"""The makers and benchmarks run, on tiny sizes, so that they cannot rot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_export.engine.calibration.contamination import require_apart
from qlora_export.engine.calibration.text import read_calibration
from qlora_export.recipe.calibration import CalibrationRecipe
from qlora_export.sources.text import read_entries
from tests.tools.running import tool, whole_tool


def builds() -> None:
    data = json.loads(tool("bench_build.py", "--weights", "1e6", "--repeats", "1", "--no-peft", "--json"))
    assert {"cat", "start-up", "bf16", "nf4", "three formats", "bitsandbytes encode"} <= set(data["rows"])
    assert all(row["seconds"] > 0 for row in data["rows"].values())
    assert data["hash_to_copy"] > 0 < data["bf16"]["hash_to_copy"]


def scale() -> None:
    sizes = ["--layers", "2", "--hidden", "128", "--small", "1e6", "--repeats", "1"]
    data = json.loads(tool("bench_scale.py", *sizes, "--json"))
    assert data["large"]["layers"] == data["planned_layers"] == 2
    assert {"time_per_weight_vs_small", "projected_seconds"} <= data.keys()
    assert all(count > 0 for count in data["large"]["resident_bytes"][1:])


def onnx() -> None:
    sizes = ["--layers", "1", "--hidden", "128", "--vocabulary", "2048"]
    data = json.loads(whole_tool("bench_onnx.py", *sizes, "--only", "onnx-int4", "--json"))
    row = data["rows"]["onnx-int4"]
    assert row["builder_anonymous_bytes"] > row["own_anonymous_bytes"] > 0
    assert row["meanwhile_bytes"] > 0 < row["folder_bytes"]


def speed_in_onnx() -> None:
    sizes = ["--layers", "1", "--hidden", "256", "--vocabulary", "2048", "--threads", "1", "--tiny"]
    data = json.loads(tool("bench_onnx_speed.py", *sizes, "--only", "onnx-fp32", "--json"))
    assert set(data["rows"]) == {"torch", "onnx-fp32"}
    assert all(row["prefill"] > 0 < row["decode"] for row in data["rows"].values())


def calibration() -> None:
    sizes = ["--hidden", "64", "96", "--sequences", "1", "--window", "8"]
    data = json.loads(tool("bench_calibration.py", *sizes, "--json"))
    assert [row["hidden"] for row in data["rows"]] == [64, 96]
    assert all(row["cpu_seconds_per_block"] > row["cpu_seconds_per_pass"] > 0 for row in data["rows"])
    assert "growth" in data["rows"][1]


def drift() -> None:
    data = json.loads(tool("bench_drift.py", "--tiny", "--json"))
    assert data["overhead"]["bare_cpu_seconds"] > 0
    assert data["resolution"]["median_tokens_asked_for"] > 0
    assert 0 <= data["resolution"]["decided"] <= 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize("benchmark", [builds, scale, onnx, speed_in_onnx, calibration, drift])
def test_the_benchmarks_that_start_commands_or_models(benchmark: Callable[[], None]) -> None:
    benchmark()


def test_the_kernel_benchmark() -> None:
    data = json.loads(tool("bench_kernels.py", "--weights", "2e5", "--json"))
    assert data["weights"] == 49 * 4096
    assert all(row["streamed"] > 0 and row["cached"] > 0 and row["share"] > 0 for row in data["rows"].values())
    assert {"nf4 encode of bf16", "int4 g128 of bf16, packed", "fp8 rows of bf16"} <= set(data["rows"])
    assert data["nf4_encode_vs_bitsandbytes"] > 0


def test_the_device_benchmark() -> None:
    data = json.loads(tool("bench_device.py", "--device", "cpu", "--weights", "1e5", "--json"))
    assert all(speed > 0 for speed in data["weights_per_second"].values())
    assert {"nf4 encode_to_copy", "merge to nf4_to_copy"} <= data.keys()


def test_the_demo_maker(tmp_path: Path) -> None:
    """A base and an adapter of a few steps, texts that have nothing in common, and no trace of this machine."""
    sizes = ["--tiny", "--base-steps", "1", "--steps", "3", "--dialogues", "20", "--rate", "1e-3"]
    tool("make_demo.py", "--out", str(tmp_path), *sizes, "--general", str(tmp_path / "general.txt"))
    halves = [{"text": name, "share": 0.5} for name in ("calibration.jsonl", "general.txt")]
    parts = read_calibration(CalibrationRecipe.model_validate(halves), tmp_path)
    assert 50_000 < len(str(parts[1].entries[0].content)) < 60_000
    require_apart(parts, read_entries("holdout.jsonl", tmp_path), "holdout.jsonl")
    record = json.loads((tmp_path / "training_record.json").read_text())
    assert record["base"]["steps"] == 1
    assert [record["adapter"][key] for key in ("dialogues", "steps", "learning_rate")] == [20, 3, 1e-3]
    assert len(record["adapter"]["relative_delta"]) == 28
    assert len(json.loads((tmp_path / "adapter/qlora_export.json").read_text())["modules"]) == 28
    texts = [path.read_text() for path in tmp_path.rglob("*.json*") if path.is_file()]
    assert not any(str(tmp_path) in text for text in texts)
