"""What a release of the embedded model makes in every format: digests of weight files, and the keys of the report.

Two trees that print the same make the same artifacts. Nothing that depends on the date, the version or a path is in it:

    python tools/golden.py > before.txt
    ... change the code ...
    python tools/golden.py | diff before.txt -

Two minutes on two cores, and 100 MB in a temporary folder.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DEMO = Path(__file__).parents[1] / "qlora_export" / "demo"
WEIGHTS = frozenset({".safetensors", ".onnx", ".data", ".gguf", ".onnx_adapter"})
# What a format needs to fit a model this small.
OPTIONS: dict[str, dict[str, Any]] = {"nf4-lowrank": {"rank": 1}}
ROUNDED: tuple[dict[str, Any], ...] = (
    {"format": "nf4", "rounding": "nearest"},
    {"format": "nf4", "rounding": "calibrated"},
    {"format": "nf4", "name": "nf4-original", "onto": "original"},
    {"format": "fp4", "rounding": "calibrated"},
    {"format": "w4a16", "rounding": "calibrated"},
    {"format": "w4a16", "name": "w4a16-mixed", "overrides": {"*.down_proj": "w8a16"}},
    {"format": "gptq", "rounding": "calibrated", "options": {"group_size": 32}},
    {"format": "nvfp4a16", "rounding": "calibrated"},
    {"format": "onnx-int4", "rounding": "calibrated"},
    {"format": "onnx-int4", "name": "onnx-int4-small", "options": {"block_size": 32, "last_matrix": "int8"}},
    {"format": "onnx-int8", "name": "onnx-js", "options": {"layout": "transformers.js"}},
)


def main() -> None:
    """Release into a temporary folder and print what is there."""
    with tempfile.TemporaryDirectory() as folder:
        for line in golden(Path(folder)):
            print(line)


def golden(folder: Path) -> Iterator[str]:
    """One line for each weight file, then one for each key of the report."""
    out = folder / "out"
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(_recipe()))
    finished = _command("release", str(path), "--out", str(out))
    if not (out / "report.json").is_file():
        raise SystemExit(finished.stderr)
    yield f"exit code {finished.returncode}"
    for file in sorted(item for item in out.rglob("*") if item.suffix in WEIGHTS and item.is_file()):
        yield f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(out)}"
    report = json.loads((out / "report.json").read_text())
    yield from (f"{artifact['name']}: {artifact['verdict']}" for artifact in report["artifacts"])
    yield from sorted(set(_keys(report, "report")))


def _recipe() -> dict[str, Any]:
    recipe: dict[str, Any] = yaml.safe_load((DEMO / "recipe.yaml").read_text())
    schema = json.loads(_command("schema", "recipe").stdout)
    formats = [name for name in schema["$defs"]["ArtifactRecipe"]["properties"]["format"]["enum"] if name != "auto"]
    calibration = {"text": str(DEMO / recipe["calibration"]["text"]), "sequences": 8}
    drift = {"text": str(DEMO / recipe["drift"]["text"]), "tokens": 500, "window_tokens": 256}
    plain = [{"format": name, "options": OPTIONS.get(name, {})} for name in formats]
    return {
        "base": str(DEMO / recipe["base"]),
        "base_id": recipe["base_id"],
        "adapter": str(DEMO / recipe["adapter"]),
        "artifacts": [{**artifact, "on_failure": "withhold"} for artifact in (*plain, *ROUNDED)],
        "calibration": calibration,
        "drift": drift,
        "publish": {"to": "folder:registry", "card": {"license": "apache-2.0"}},
    }


def _command(*words: str) -> subprocess.CompletedProcess[str]:
    started = [sys.executable, "-m", "qlora_export", *words]
    return subprocess.run(started, capture_output=True, text=True, check=False, cwd=DEMO.parents[1])


def _keys(value: Any, place: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{place}.{key}"
            yield from _keys(item, f"{place}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item, f"{place}[]")


if __name__ == "__main__":
    main()
