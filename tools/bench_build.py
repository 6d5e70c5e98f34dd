"""Measure builds against the disk and against peft, side by side on a model this tool makes.

    python tools/bench_build.py [--weights 1.2e9] [--repeats 3] [--device cpu] [--json] [--work FOLDER]

Every row is a whole process. Before each, what earlier rows wrote is synced, and the base leaves the page cache or, for
rows that are called warm, enters it; the fastest of a few rounds counts, since the machine is shared. For each format

    ratio_to_copy      (build - start-up) / (cat of the base + writing the artifact's bytes with fsync)
    hash_to_copy       sha256 of base and artifact on one core / the same copy; every build does it on the way
    speedup_over_peft  peft's load, merge and save / the whole build, both with the base in the page cache; peft does
                       not sync what it saves
    memory_vs_peft     resident peaks, as the kernel reports them

with the keys of `nf4` at the top and those of `bf16` below their name. `warm_ratio_to_copy` has the base in the page
cache for both sides, `cold_speedup_over_peft` on the disk. `three_formats_to_one` is one pass that makes bf16, nf4 and
nf4-adapter against bf16 alone. Start-up is what `plan` takes: everything before the first weight is read. The encode of
bitsandbytes is projected from a part.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from bench_model import make_adapter, make_base, shape_of
from bench_process import Cost, cost, evict

CHUNK_BYTES = 1 << 22
PEFT_MERGE = """
import sys, torch, transformers, peft
base, adapter, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
BITSANDBYTES_ENCODE = """
import sys, time, torch, bitsandbytes
weight = torch.randn(int(float(sys.argv[1])) // 4096 + 1, 4096).to(torch.bfloat16)
started = time.perf_counter()
bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
print((time.perf_counter() - started) / weight.numel())
"""
BUILDS = {"bf16": ["bf16"], "nf4": ["nf4"], "three formats": ["bf16", "nf4", "nf4-adapter"]}
SAMPLE_WEIGHTS = 3e7


class Bench:
    """The model, and how each row is measured on it."""

    def __init__(self, work: Path, repeats: int, device: str) -> None:
        self.work = work
        self.base = work / "base"
        self.out = work / "out"
        self._repeats = repeats
        self._device = device

    def fastest(self, run: Callable[[], Cost], cold: bool = True) -> Cost:
        """The fastest of a few rounds on a base that lies on the disk alone, or in the page cache."""
        found = []
        for _ in range(self._repeats):
            shutil.rmtree(self.out, ignore_errors=True)
            os.sync()
            if cold:
                evict(self.base)
            else:
                self.cat()
            found.append(run())
        return min(found, key=lambda one: one.seconds)

    def cat(self) -> Cost:
        """Read the base."""
        return cost(["/bin/sh", "-c", f"cat '{self.base}'/*.safetensors > /dev/null"])

    def command(self, verb: str, formats: Sequence[str]) -> list[str]:
        """The command line of a verb."""
        words = [sys.executable, "-m", "qlora_export", verb, "--out", str(self.out)]
        words += ["--base", str(self.base), "--adapter", str(self.work / "adapter"), "--device", self._device]
        return words + [word for name in formats for word in ("--format", name)]

    def peft(self) -> Cost:
        """Load, merge, save."""
        return cost([sys.executable, "-c", PEFT_MERGE, str(self.base), str(self.work / "adapter"), str(self.out)])

    def bytes_of(self, name: str) -> int:
        """Size of the weights of an artifact, which the last build of it left."""
        return sum(path.stat().st_size for path in (self.out / name).glob("*.safetensors"))

    def write(self, count: int) -> Cost:
        """Write so many bytes with fsync."""
        path, chunk = self.work / "written", os.urandom(CHUNK_BYTES)
        started = time.perf_counter()
        with path.open("wb") as file:
            for first in range(0, count, CHUNK_BYTES):
                file.write(chunk[: count - first])
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        path.unlink()
        return Cost(seconds, 0)

    def hashing(self, count: int) -> Cost:
        """sha256 of so many bytes on one core."""
        chunk, digest = os.urandom(CHUNK_BYTES), hashlib.sha256()
        started = time.perf_counter()
        for _ in range(0, count, CHUNK_BYTES):
            digest.update(chunk)
        return Cost(time.perf_counter() - started, 0)

    def bitsandbytes(self, weights: int) -> Cost:
        """Its encode on a CPU, projected from a sample."""
        answer = self.work / "seconds"
        found = cost([sys.executable, "-c", BITSANDBYTES_ENCODE, str(min(weights, SAMPLE_WEIGHTS))], str(answer))
        return Cost(float(answer.read_text()) * weights, found.resident_bytes)


def measure(bench: Bench, weights: int, with_peft: bool) -> dict[str, Cost]:
    """All rows, in the order of the table."""
    rows = {"cat": bench.fastest(bench.cat), "cat, warm": bench.fastest(bench.cat, cold=False)}
    base_bytes = sum(path.stat().st_size for path in bench.base.glob("*.safetensors"))
    rows["start-up"] = bench.fastest(lambda: cost(bench.command("plan", ["nf4"])))
    for name, formats in BUILDS.items():
        command = bench.command("build", formats)
        rows[name] = bench.fastest(lambda command=command: cost(command))  # type: ignore[misc]
        if name in formats:
            count = bench.bytes_of(name)
            rows[f"{name}, warm"] = bench.fastest(lambda command=command: cost(command), cold=False)  # type: ignore[misc]
            rows[f"write {name}"] = bench.fastest(lambda count=count: bench.write(count))  # type: ignore[misc]
            rows[f"hash {name}"] = bench.hashing(base_bytes + count)
    rows["bitsandbytes encode"] = bench.bitsandbytes(weights)
    if with_peft:
        rows["peft"] = bench.fastest(bench.peft)
        rows["peft, warm"] = bench.fastest(bench.peft, cold=False)
    return rows


def ratios_of(rows: dict[str, Cost], name: str) -> dict[str, float]:
    """What one format costs against a copy and against peft."""
    copy = rows["cat"].seconds + rows[f"write {name}"].seconds
    warm_copy = rows["cat, warm"].seconds + rows[f"write {name}"].seconds
    start_up = rows["start-up"].seconds
    ratios = {
        "ratio_to_copy": (rows[name].seconds - start_up) / copy,
        "warm_ratio_to_copy": (rows[f"{name}, warm"].seconds - start_up) / warm_copy,
        "hash_to_copy": rows[f"hash {name}"].seconds / copy,
    }
    if "peft" in rows:
        ratios["speedup_over_peft"] = rows["peft, warm"].seconds / rows[f"{name}, warm"].seconds
        ratios["cold_speedup_over_peft"] = rows["peft"].seconds / rows[name].seconds
        ratios["memory_vs_peft"] = rows[name].resident_bytes / rows["peft"].resident_bytes
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, default=1.2e9)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the model and outputs [default: a temporary one]")
    parser.add_argument("--device", default="cpu", help="what computes the builds")
    parser.add_argument("--dora", action="store_true", help="a DoRA adapter instead of a plain one")
    parser.add_argument("--no-peft", dest="peft", action="store_false")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shape = shape_of(options.weights)
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        bench = Bench(Path(name), options.repeats, options.device)
        make_base(bench.base, shape)
        make_adapter(bench.work / "adapter", shape, options.dora)
        rows = measure(bench, shape.weights, options.peft)
    three = rows["three formats"].seconds / rows["bf16"].seconds
    ratios = {**ratios_of(rows, "nf4"), "bf16": ratios_of(rows, "bf16"), "three_formats_to_one": three}
    if options.json:
        table = {label: asdict(row) for label, row in rows.items()}
        print(json.dumps({"weights": shape.weights, **ratios, "rows": table}, indent=2))
        return
    print(f"{shape.weights / 1e9:.2f} B weights, {shape.layers} layers, rank-16 adapter on all linear layers")
    for label, row in rows.items():
        print(f"{label:<20} {row.seconds:7.2f} s {row.resident_bytes / 1e6:9.0f} MB")
    print(json.dumps(ratios, indent=2))


if __name__ == "__main__":
    main()
