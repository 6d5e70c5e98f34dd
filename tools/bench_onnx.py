"""Export a Llama of random weights to every kind of ONNX artifact and note what each process holds meanwhile.

    python tools/bench_onnx.py [--layers 10] [--hidden 2048] [--only NAME ...] [--json] [--work FOLDER]

    builder, this tool   peak anonymous memory: what a process holds that the system cannot drop and read again. Weights
                         that are mapped from a file are not in it
    meanwhile            peak of the disk that the unfinished folder takes, files without a name among it
    seconds              the export alone; its source lies there, finished

Random weights are what a real model's are to all of these: memory and time depend on shapes alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_model import Shape, make_base
from bench_process import cost

import qlora_export.demo

PACKED = {"format": "w4a16", "rounding": "nearest", "options": {"group_size": 32}}
NEAREST = {"format": "onnx-int4", "rounding": "nearest"}
ARTIFACTS: dict[str, tuple[Any, Any]] = {
    "onnx-fp32": ("bf16", "onnx-fp32"),
    "onnx-fp16": ("bf16", "onnx-fp16"),
    "onnx-int8": ("bf16", "onnx-int8"),
    "onnx-int4": ("bf16", "onnx-int4"),
    "onnx-int4 nearest": (PACKED, NEAREST),
    "onnx-int4 k_quant": ("bf16", {"format": "onnx-int4", "options": {"algorithm": "k_quant"}}),
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
INTERVAL_SECONDS = 0.02


@dataclass(frozen=True)
class Held:
    """Peaks of one export, in bytes, and its time."""

    builder_anonymous_bytes: int
    own_anonymous_bytes: int
    meanwhile_bytes: int
    folder_bytes: int
    seconds: float


def export(work: Path, source: Any, artifact: Any) -> Held:
    """Build the source, then watch the export of it."""
    recipe = work / "recipe.yaml"
    words = [sys.executable, "-m", "qlora_export", "build", str(recipe), "--out", str(work / "out")]
    recipe.write_text(json.dumps({"base": "base", "artifacts": [source]}))
    cost(words)
    recipe.write_text(json.dumps({"base": "base", "artifacts": [source, artifact]}))
    started = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        own, builder, meanwhile = watch(process, work / "out")
        errors = process.stderr.read() if process.stderr else ""
    if process.returncode:
        raise SystemExit(f"{' '.join(words)}: ended with status {process.returncode}\n{errors}")
    seconds = time.perf_counter() - started
    (made,) = (work / "out").glob("onnx-*")
    size = taken(made)
    shutil.rmtree(made)
    return Held(builder, own, meanwhile, size, seconds)


def watch(process: subprocess.Popen[str], out: Path) -> tuple[int, int, int]:
    """Peaks until a process ends: anonymous memory of it and of its children, and disk under unfinished folders."""
    own = builder = meanwhile = 0
    while process.poll() is None:
        children = descendants(process.pid)
        own = max(own, anonymous(process.pid))
        builder = max(builder, *map(anonymous, children), 0)
        unfinished = sum(map(taken, out.glob("*.partial")))
        meanwhile = max(meanwhile, unfinished + sum(map(nameless, children)))
        time.sleep(INTERVAL_SECONDS)
    return own, builder, meanwhile


def descendants(pid: int) -> list[int]:
    """The children of a process, and theirs."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    children = [int(word) for words in lists for word in words.split()]
    return children + [found for child in children for found in descendants(child)]


def anonymous(pid: int) -> int:
    """Bytes that a process holds and no file has; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def nameless(pid: int) -> int:
    """Bytes of the files that a process has mapped and whose names are gone."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return 0
    spans = [line.split()[0].split("-") for line in lines if line.endswith("(deleted)")]
    return sum(int(last, 16) - int(first, 16) for first, last in spans)


def taken(folder: Path) -> int:
    """Bytes of the disk under a folder, without the holes of its files."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512 if path.is_file() else 0
        except OSError:
            continue
    return total


def shape_from(options: argparse.Namespace) -> Shape:
    """With the proportions of Llama-3.2-1B."""
    heads = max(4, options.hidden // 64)
    return Shape(options.hidden, options.hidden * 4, options.layers, options.vocabulary, heads, max(2, heads // 4))


def row_of(artifact: str, row: Held) -> str:
    """A line of the table."""
    sizes = (row.builder_anonymous_bytes, row.own_anonymous_bytes, row.meanwhile_bytes, row.folder_bytes)
    one, two, three, four = (f"{size / 1e9:.2f}" for size in sizes)
    return f"{artifact:20}{one:>9}{two:>11}{three:>11}{four:>8}{row.seconds:>9.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--only", nargs="*", choices=tuple(ARTIFACTS), default=tuple(ARTIFACTS))
    parser.add_argument("--work", type=Path, help="folder for the model and outputs [default: a temporary one]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shape = shape_from(options)
    if not options.json:
        print(f"{shape.weights / 1e6:.0f} M weights, {shape.layers} layers, {os.cpu_count()} cores; GB")
        print(f"{'':20}{'builder':>9}{'this tool':>11}{'meanwhile':>11}{'folder':>8}{'seconds':>9}")
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        work = Path(name)
        make_base(work / "base", shape)
        for file in TOKENIZER:
            shutil.copy(Path(qlora_export.demo.__file__).parent / "base" / file, work / "base" / file)
        rows = {}
        for artifact in options.only:
            rows[artifact] = export(work, *ARTIFACTS[artifact])
            if not options.json:
                print(row_of(artifact, rows[artifact]), flush=True)
    if options.json:
        print(json.dumps({"weights": shape.weights, "rows": {name: asdict(row) for name, row in rows.items()}}))


if __name__ == "__main__":
    main()
