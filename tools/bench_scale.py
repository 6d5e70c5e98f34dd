"""Build a model of the shape of LLaMA 65B to NF4 and see that time per weight and memory stay what they are at 1 B.

    python tools/bench_scale.py [--layers 80] [--hidden 8192] [--json] [--work FOLDER]

The base is made of sparse files: its zeros never touch the disk, and the kernels take as long over zeros as over
anything else. The adapter is real (rank 16 on all linear layers), and so is every byte of the output; where the disk
has no room for it, as many layers are built as fit. The 1 B model is that of bench_build.py, warm in the page cache and
cold. Zeros of a sparse file do not come from the disk, but the kernel makes a page for each 4 KB of them all the same.

    time_per_weight_vs_small   seconds a weight, start-up left out, against the small model's in the page cache
    time_per_weight_vs_cold    the same against the small model's on the disk
    projected_seconds          the build of the whole shape where reading its base takes `--disk` bytes a second
    resident                   of the process while it runs: a tenth of the way, half of the way, at its peak
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench_model import Shape, make_adapter, make_base, make_sparse_base, shape_of
from bench_process import cost, evict

LLAMA_65B = Shape(8192, 22016, 80, 32000, 64, 64)
BYTES_PER_WEIGHT = 0.53
SPARE_BYTES = 8_000_000_000


@dataclass(frozen=True)
class Run:
    """A build to NF4, start-up left out, and the resident memory of its process as it went."""

    weights: int
    layers: int
    seconds: float
    output_bytes: int
    resident_bytes: tuple[int, ...]

    @property
    def seconds_per_weight(self) -> float:
        """What counts."""
        return self.seconds / self.weights


def fitting(shape: Shape, free_bytes: int) -> Shape:
    """The shape with as many layers as the disk has room for."""
    layers = shape.layers
    while layers > 1 and replace(shape, layers=layers).weights * BYTES_PER_WEIGHT > free_bytes:
        layers -= 1
    return replace(shape, layers=layers)


def run(work: Path, shape: Shape) -> Run:
    """Plan for the start-up, then build."""
    out = work / "out"
    words = ["--base", str(work / "base"), "--adapter", str(work / "adapter"), "--format", "nf4", "--out", str(out)]
    start_up = cost([sys.executable, "-m", "qlora_export", "plan", *words]).seconds
    started = time.perf_counter()
    null = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
    words = [sys.executable, "-m", "qlora_export", "build", *words]
    pid = os.posix_spawn(words[0], words, os.environ, file_actions=null)
    samples: list[int] = []
    ended = threading.Event()
    watcher = threading.Thread(target=watch, args=(pid, samples, ended))
    watcher.start()
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - started - start_up
    ended.set()
    watcher.join()
    if status:
        raise SystemExit(f"{' '.join(words)}: ended with status {status}")
    size = sum(path.stat().st_size for path in (out / "nf4").iterdir())
    shutil.rmtree(out)
    early, middle = samples[len(samples) // 10], samples[len(samples) // 2]
    return Run(shape.weights, shape.layers, seconds, size, (early, middle, usage.ru_maxrss * 1024))


def from_the_disk(work: Path, shape: Shape, repeats: int) -> Run:
    """The fastest of some runs whose base had left the page cache."""
    found = []
    for _ in range(repeats):
        evict(work / "base")
        found.append(run(work, shape))
    return min(found, key=lambda one: one.seconds)


def watch(pid: int, samples: list[int], ended: threading.Event) -> None:
    """Note the resident memory of a process a few times a second."""
    while not samples or not ended.wait(0.2):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            status = ""
        found = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS")]
        samples += found or [0] * (not samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LLAMA_65B.layers)
    parser.add_argument("--hidden", type=int, default=LLAMA_65B.hidden)
    parser.add_argument("--small", type=float, default=1.2e9, help="weights of the small model")
    parser.add_argument("--repeats", type=int, default=2, help="runs of the small model, the fastest of which counts")
    parser.add_argument("--disk", type=float, default=0.97e9, help="bytes a second of a real disk, for the projection")
    parser.add_argument("--work", type=Path, help="folder for the models and outputs [default: a temporary one]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    scale = options.hidden / LLAMA_65B.hidden
    heads = max(4, options.hidden // 128)
    whole = Shape(options.hidden, int(22016 * scale) // 16 * 16, options.layers, 32000, heads, heads)
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        work = Path(name)
        shape = fitting(whole, shutil.disk_usage(work).free - SPARE_BYTES)
        small_shape = shape_of(options.small)
        make_base(work / "small/base", small_shape)
        make_adapter(work / "small/adapter", small_shape, dora=False)
        cold = from_the_disk(work / "small", small_shape, options.repeats)
        runs = [run(work / "small", small_shape) for _ in range(options.repeats)]
        small = min(runs, key=lambda one: one.seconds)
        shutil.rmtree(work / "small")
        make_sparse_base(work / "large/base", shape)
        make_adapter(work / "large/adapter", shape, dora=False)
        large = run(work / "large", shape)
    reading = 2 * whole.weights / options.disk
    data = {
        "time_per_weight_vs_small": large.seconds_per_weight / small.seconds_per_weight,
        "time_per_weight_vs_cold": large.seconds_per_weight / cold.seconds_per_weight,
        "projected_seconds": max(reading, large.seconds_per_weight * whole.weights),
        "reading_seconds": reading,
        "planned_layers": whole.layers,
        "large": asdict(large),
        "small": asdict(small),
        "cold": asdict(cold),
    }
    if options.json:
        print(json.dumps(data, indent=2))
        return
    for label, found in (("small", small), ("small, cold", cold), ("large", large)):
        resident = " / ".join(f"{count / 1e6:.0f}" for count in found.resident_bytes)
        print(f"{label}: {found.weights / 1e9:.2f} B weights in {found.layers} layers, {found.seconds:.1f} s")
        print(f"  {found.seconds_per_weight * 1e9:.2f} ns a weight, {found.output_bytes / 1e9:.1f} GB, {resident} MB")
    print(f"time per weight to small: {data['time_per_weight_vs_small']:.2f}")
    print(f"time per weight to small, cold: {data['time_per_weight_vs_cold']:.2f}")
    print(f"{whole.layers} layers where reading the base takes {reading:.0f} s: {data['projected_seconds']:.0f} s")


if __name__ == "__main__":
    main()
