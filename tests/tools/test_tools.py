"""The makers and benchmarks run, on tiny sizes, so that they cannot rot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tool(name: str, *arguments: str) -> str:
    words = [sys.executable, str(ROOT / "tools" / name), *arguments]
    found = subprocess.run(words, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_the_build_benchmark() -> None:
    data = json.loads(tool("bench_build.py", "--weights", "3e6", "--no-peft", "--json"))
    assert set(data["rows"]) == {"cat", "cp", "bf16", "nf4", "three formats"}
    assert all(row["seconds"] > 0 for row in data["rows"].values())


def test_the_kernel_benchmark() -> None:
    data = json.loads(tool("bench_kernels.py", "--weights", "2e5", "--json"))
    assert data["weights"] == 49 * 4096
    assert all(row["streamed"] > 0 and row["cached"] > 0 and row["share"] > 0 for row in data["rows"].values())
    assert {"nf4 encode of bf16", "int4 g128 of bf16, packed", "fp8 rows of bf16"} <= set(data["rows"])
    assert data["ratios"]["nf4_encode_vs_bitsandbytes"] > 0


def test_the_demo_maker(tmp_path: Path) -> None:
    """A base and an adapter of a few steps, with record, sidecar and no trace of this machine."""
    sizes = ["--base-steps", "2", "--steps", "2", "--dialogues", "20"]
    tool("make_demo.py", "--out", str(tmp_path), *sizes)
    record = json.loads((tmp_path / "training_record.json").read_text())
    assert len(record["adapter"]["relative_delta"]) == 28
    assert len(json.loads((tmp_path / "adapter/qlora_export.json").read_text())["modules"]) == 28
    texts = [path.read_text() for path in tmp_path.rglob("*.json*") if path.is_file()]
    assert not any(str(tmp_path) in text for text in texts)
