"""Time every kind of ONNX artifact in ONNX Runtime GenAI beside torch, on a Llama of random weights.

    python tools/bench_onnx_speed.py [--layers 16] [--hidden 1024] [--threads N] [--only NAME ...] [--tiny] [--json]

    prefill      a prompt of 256 tokens, tokens a second
    decode       64 tokens after it, one by one, most likely first, tokens a second
    of torch     the same divided by torch's: the merged model in float32, its cache on, as many threads
    of reading   decoded tokens a second, divided by how often the weights could be read from memory in that time

A decoder of one prompt reads every weight for each token, so that the memory is its limit. Least of three runs; each
artifact in a process of its own.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_model import Shape, make_base

import qlora_export.demo

DEMO = Path(qlora_export.demo.__file__).parent
INTEGERS = {"format": "w4a16", "rounding": "nearest", "options": {"group_size": 32}}
ARTIFACTS: dict[str, dict[str, Any]] = {
    "onnx-fp32": {"format": "onnx-fp32"},
    "onnx-fp16": {"format": "onnx-fp16"},
    "onnx-int8": {"format": "onnx-int8"},
    "onnx-int4": {"format": "onnx-int4"},
    "onnx-int4-level-1": {"format": "onnx-int4", "options": {"accuracy_level": 1}},
    "onnx-int4-of-w4a16": {"format": "onnx-int4", "rounding": "nearest"},
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Size:
    """How much is timed, and how often."""

    prompt: int
    decoded: int
    repeats: int
    read_bytes: int


FULL = Size(prompt=256, decoded=64, repeats=3, read_bytes=1 << 29)
TINY = Size(prompt=8, decoded=2, repeats=1, read_bytes=1 << 20)


def build(work: Path, names: list[str]) -> None:
    """Make artifacts of the base, and what they are made from."""
    recipe = work / "recipe.yaml"
    chosen = [{**ARTIFACTS[name], "name": name} for name in names]
    artifacts = ["bf16", *([INTEGERS] if any("rounding" in item for item in chosen) else []), *chosen]
    recipe.write_text(json.dumps({"base": "base", "artifacts": artifacts}))
    words = [sys.executable, "-m", "qlora_export", "build", str(recipe), "--out", str(work / "out")]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def timed(folder: Path, options: argparse.Namespace, kind: str) -> dict[str, float]:
    """What a process of its own measures."""
    words = [sys.executable, __file__, "--time", kind, "--work", str(folder), "--threads", str(options.threads)]
    words += ["--tiny"] if options.tiny else []
    found = subprocess.run(words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    rates: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return rates


def rates(run: Callable[[], tuple[float, float]], size: Size) -> dict[str, float]:
    """Tokens a second of the least times, after one run that is not counted."""
    run()
    prefill, decode = zip(*(run() for _ in range(size.repeats)), strict=True)
    return {"prefill": size.prompt / min(prefill), "decode": size.decoded / min(decode)}


def in_genai(folder: Path, threads: int, size: Size) -> dict[str, float]:
    """ONNX Runtime GenAI, as a consumer runs it."""
    path = folder / "genai_config.json"
    settings = json.loads(path.read_text())
    settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(settings))
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))

    def run() -> tuple[float, float]:
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=size.prompt + size.decoded + 1, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        started = time.perf_counter()
        generator.append_tokens(list(range(3, 3 + size.prompt)))
        prefilled = time.perf_counter()
        for _ in range(size.decoded):
            generator.generate_next_token()
        return prefilled - started, time.perf_counter() - prefilled

    return rates(run, size)


def in_torch(folder: Path, threads: int, size: Size) -> dict[str, float]:
    """transformers, the weights widened to float32."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run() -> tuple[float, float]:
        tokens = torch.arange(3, 3 + size.prompt)[None]
        started = time.perf_counter()
        found = model(tokens, use_cache=True)
        prefilled = time.perf_counter()
        for _ in range(size.decoded):
            token = found.logits[:, -1:].argmax(-1)
            found = model(token, past_key_values=found.past_key_values, use_cache=True)
        return prefilled - started, time.perf_counter() - prefilled

    with torch.inference_mode():
        return rates(run, size)


def read_bytes_per_second(size: Size) -> float:
    """How fast this process reads memory."""
    values = np.ones(size.read_bytes // 8)
    seconds = []
    for _ in range(size.repeats + 1):
        started = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - started)
    return size.read_bytes / min(seconds)


def measure(options: argparse.Namespace, work: Path) -> dict[str, dict[str, float]]:
    """Rates of torch and of every artifact, and the bytes of their weights."""
    shape = Shape(options.hidden, options.hidden * 4, options.layers, options.vocabulary, options.hidden // 64, 4)
    make_base(work / "base", shape)
    for file in TOKENIZER:
        shutil.copy(DEMO / "base" / file, work / "base" / file)
    build(work, options.only)
    found = {"torch": {**timed(work / "out/bf16", options, "torch"), "bytes": 4.0 * shape.weights}}
    for name in options.only:
        folder = work / "out" / name
        size = (folder / "model.onnx.data").stat().st_size
        found[name] = {**timed(folder, options, "genai"), "bytes": float(size)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", choices=tuple(ARTIFACTS), default=tuple(ARTIFACTS))
    parser.add_argument("--work", type=Path, help="folder for the model and outputs [default: a temporary one]")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--time", choices=("genai", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help="a few tokens, to see that the tool runs")
    options = parser.parse_args()
    size = TINY if options.tiny else FULL
    if options.time:
        run = in_genai if options.time == "genai" else in_torch
        print(json.dumps(run(options.work, options.threads, size)))
        return
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        found = measure(options, Path(name))
    bandwidth = read_bytes_per_second(size)
    if options.json:
        print(json.dumps({"read_bytes_per_second": bandwidth, "rows": found}))
        return
    shape = f"{options.layers} layers of {options.hidden}, {options.threads} threads"
    print(f"{shape}; memory is read at {bandwidth / 1e9:.1f} GB/s")
    print(f"{'':20}{'GB':>6}{'prefill':>9}{'of torch':>10}{'decode':>8}{'of torch':>10}{'of reading':>12}")
    for name, row in found.items():
        ratios = [row[key] / found["torch"][key] for key in ("prefill", "decode")]
        reading = row["decode"] * row["bytes"] / bandwidth
        print(
            f"{name:20}{row['bytes'] / 1e9:>6.2f}{row['prefill']:>9.0f}{ratios[0]:>10.2f}"
            f"{row['decode']:>8.1f}{ratios[1]:>10.2f}{reading:>12.2f}"
        )


if __name__ == "__main__":
    main()
