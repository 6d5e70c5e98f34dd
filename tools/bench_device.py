"""Measure the kernels of an accelerator beside what its memory and its link allow.

    python tools/bench_device.py [--device cuda] [--weights 2.7e8] [--json]

    nf4 encode        absmax and codes of bf16 rows that lie there, codes brought back
    merge to bf16     round trip to 4 bits, a delta of rank 16, rounding, brought back
    merge to nf4      the same and encoded again
    whole block       merge to nf4 with the rows sent from the host first, as a build does

Speeds are weights per second, the fastest of a few rounds. `copy` is the device's own copy of the rows and `send` their
way from pinned host memory, in weights per second too, so that a row over `copy` is its share of what memory allows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from qlora_export.quant.device import kernels
from qlora_export.quant.device.accelerator import BLOCK_WEIGHTS, Accelerator
from qlora_export.quant.four_bit import NF4
from qlora_export.tensors.dtypes import narrow, round_to

COLUMNS, RANK, BLOCK, ROUNDS = 4096, 16, 64, 5


class Bench:
    """Rows on a device, in blocks as a build takes them."""

    def __init__(self, device: str, weights: int) -> None:
        self.accelerator = Accelerator(device)
        rows = max(1, min(weights, BLOCK_WEIGHTS) // COLUMNS)
        rng = np.random.default_rng(1)
        values = (rng.standard_normal(rows * COLUMNS) * 0.02).astype(np.float32)
        self.bits = narrow(values, "BF16").view(np.uint16)
        self.repeats = max(1, weights // self.bits.size)
        self.absmax = np.empty(self.bits.size // BLOCK, np.float32)
        kernels.block_absmax(self.bits, BLOCK, self.absmax)
        self.left = rng.standard_normal((rows, RANK)).astype(np.float32)
        self.right = rng.standard_normal((RANK, COLUMNS)).astype(np.float32)
        with self.accelerator.working():
            self.rows = self.accelerator.send(self.bits)

    def copy(self, rows: Any) -> None:
        rows.clone()

    def send(self, rows: Any) -> None:
        self.accelerator.send(self.bits)

    def encode(self, rows: Any) -> None:
        absmax = np.empty_like(self.absmax)
        kernels.block_absmax(rows, BLOCK, absmax)
        kernels.encode_four_bit(rows, absmax, BLOCK, NF4)

    def merged(self, rows: Any) -> Any:
        values = round_to(kernels.round_trip(rows, self.absmax, self.absmax, BLOCK, NF4), "BF16")
        kernels.add_low_rank(values.reshape(-1, COLUMNS), self.right, self.left, np.float32(0.01))
        return values

    def merge_to_bfloat16(self, rows: Any) -> None:
        narrow(self.merged(rows), "BF16")

    def merge_to_nf4(self, rows: Any) -> None:
        self.encode(self.merged(rows))

    def whole_block(self, rows: Any) -> None:
        self.merge_to_nf4(self.accelerator.send(self.bits))

    def speed(self, work: Callable[[Any], None]) -> float:
        """Weights per second."""
        seconds = []
        for _ in range(ROUNDS + 1):
            started = time.perf_counter()
            with self.accelerator.working():
                for _ in range(self.repeats):
                    work(self.rows)
            seconds.append(time.perf_counter() - started)
        return self.repeats * self.bits.size / min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--weights", type=float, default=2**28)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bench = Bench(options.device, int(options.weights))
    works = {
        "copy": bench.copy,
        "send": bench.send,
        "nf4 encode": bench.encode,
        "merge to bf16": bench.merge_to_bfloat16,
        "merge to nf4": bench.merge_to_nf4,
        "whole block": bench.whole_block,
    }
    speeds = {name: bench.speed(work) for name, work in works.items()}
    name = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else options.device
    if options.json:
        shares = {f"{name}_to_copy": speed / speeds["copy"] for name, speed in speeds.items() if name != "copy"}
        print(json.dumps({"device": name, "weights_per_second": speeds, **shares}, indent=2))
        return
    print(f"{name}; M weights/s, share of the device's copy")
    for label, speed in speeds.items():
        print(f"{label:<16} {speed / 1e6:10.0f} {speed / speeds['copy']:6.3f}")


if __name__ == "__main__":
    main()
