"""What calibrated rounding costs for a decoder block, and how that grows with the hidden size.

    python tools/bench_calibration.py [--hidden 256 512 1024] [--sequences 16] [--window 256] [--format nf4] [--json]

A Llama of two blocks with random weights and a random adapter is calibrated on random tokens, in a process of its own
for each size. Time is CPU time, since the machine may be shared, and per block. Beside it stands what one pass of the
tokens through the block costs in the same process, the least that anything data-aware needs, and peak memory beside the
bytes of one block in float32. `growth` is the exponent between two sizes: 2 is that of the weights, 3 of the inverse.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from bench_model import Shape, make_adapter, make_base

VOCABULARY = 1000
BLOCKS = 2


def shape_of(hidden: int) -> Shape:
    """Two blocks with the proportions of Llama-3.2-1B."""
    heads = max(hidden // 64, 4)
    return Shape(hidden, hidden * 4, BLOCKS, VOCABULARY, heads, max(heads // 4, 1))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One size, in this process: CPU seconds of a block, of one pass through it, and peak memory."""
    import torch

    from qlora_export.engine.calibration import block_pass
    from qlora_export.engine.calibration.calibrate import calibrate
    from qlora_export.engine.calibration.text import CalibrationTokens
    from qlora_export.planning.make import make_plan
    from qlora_export.recipe.load import make_recipe

    torch.set_num_threads(1)
    shape = shape_of(arguments.hidden[0])
    with tempfile.TemporaryDirectory() as folder:
        base, adapter, out = (Path(folder) / name for name in ("base", "adapter", "out"))
        make_base(base, shape)
        make_adapter(adapter, shape, dora=False)
        artifact = {"format": arguments.format, "rounding": "calibrated"}
        data = {"base": str(base), "adapter": str(adapter), "artifacts": [artifact], "calibration": {"text": "none"}}
        plan = make_plan(make_recipe(data, Path(folder), "benchmark"), out)
        rng = np.random.default_rng(0)
        windows = rng.integers(0, VOCABULARY, (arguments.sequences, arguments.window)).tolist()
        tokens = CalibrationTokens(tuple(tuple(window) for window in windows), (), ())
        passes = _note_times(block_pass, "advance")
        decided = _note_times(block_pass.BlockRun, "block")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        calibrate(plan, plan.artifacts[0], tokens, block_pass.CalibrationOptions(out))
    seconds = float(np.median(decided))
    weights = (shape.weights - VOCABULARY * shape.hidden) // BLOCKS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "hidden": shape.hidden,
        "weights_per_block": weights,
        "cpu_seconds_per_block": seconds,
        "cpu_seconds_per_pass": float(np.median(passes)),
        "passes": seconds / float(np.median(passes)),
        "peak_bytes": (peak - before) * 1024,
        "block_bytes": 4 * weights,
    }


def _note_times(owner: Any, name: str) -> list[float]:
    """From now on the CPU seconds of every call of a function are put into the list that is returned."""
    noted: list[float] = []
    function = getattr(owner, name)

    def call(*words: Any) -> Any:
        started = time.process_time()
        result = function(*words)
        noted.append(time.process_time() - started)
        return result

    setattr(owner, name, call)
    return noted


def main() -> None:
    """Measure every size in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments)))
        return
    rows = [_in_a_process(arguments, hidden) for hidden in arguments.hidden]
    for smaller, larger in pairwise(rows):
        ratio = larger["cpu_seconds_per_block"] / smaller["cpu_seconds_per_block"]
        larger["growth"] = math.log(ratio) / math.log(larger["hidden"] / smaller["hidden"])
    data = {"format": arguments.format, "sequences": arguments.sequences, "window": arguments.window, "rows": rows}
    if arguments.json:
        print(json.dumps(data, indent=2))
        return
    print(f"{arguments.format} calibrated, {arguments.sequences} sequences of {arguments.window} tokens, one thread")
    print("hidden  weights a block  s a block  passes through the block  growth  peak MB  block MB")
    for row in rows:
        growth = f"{row['growth']:.2f}" if "growth" in row else ""
        print(
            f"{row['hidden']:6}  {row['weights_per_block']:15,}  {row['cpu_seconds_per_block']:9.2f}  "
            f"{row['passes']:24.1f}  {growth:>6}  {row['peak_bytes'] / 1e6:7.0f}  {row['block_bytes'] / 1e6:8.0f}"
        )


def _in_a_process(arguments: argparse.Namespace, hidden: int) -> dict[str, Any]:
    words = ["--one", "--hidden", str(hidden), "--sequences", str(arguments.sequences)]
    words += ["--window", str(arguments.window), "--format", arguments.format]
    found = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return row


if __name__ == "__main__":
    main()
