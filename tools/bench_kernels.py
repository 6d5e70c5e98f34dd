"""Measure every kernel of a build on one thread, beside what memory allows and beside the libraries it replaces.

    python tools/bench_kernels.py [--weights 6.7e7] [--json]

Weights are random bf16 in rows of 4,096. A kernel walks over them in blocks of 32 rows (131,072 weights), as a build
does: what lies between its input and its output stays in the second-level cache. `streamed` is its speed over all
weights, input from memory and output to memory; `cached` is the same work on the first block again and again. `limit`
is the bandwidth of a numpy copy, both ways counted, divided by the bytes that the kernel must move for a weight;
`share` is `streamed` over `limit`, a little above one where a kernel only reads. With few weights all of it is cached
and the limit says nothing. Every number is the best of a few rounds, compilation left out.

The peers do the same work from bf16 tensors with one torch thread: bitsandbytes' `quantize_4bit`, and
compressed-tensors' `calculate_qparams`, `quantize` and `pack_to_int32`. `ratios` are our `streamed` over theirs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import bitsandbytes.functional as bnb
import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams

from qlora_export.merge.loaded_changes import LoadedProduct, RowFactors
from qlora_export.quant import double_quant, float8, floats, four_bit, integers, packing, scales

COLUMNS = 4096
BLOCK_ROWS = 32
NF4_BLOCK = 64
RANK = 16
ROUNDS = 5
INT4 = integers.Grid(4, 128)
INT8 = integers.Grid(8, None)
Work = Callable[[slice], None]


@dataclass(frozen=True)
class Kernel:
    """Work on a slice of rows, and the bytes it reads and writes in memory for one weight."""

    work: Work
    bytes_per_weight: float


@dataclass(frozen=True)
class Row:
    """Speeds in weights per second."""

    streamed: float
    cached: float
    limit: float
    bytes_per_weight: float

    @property
    def share(self) -> float:
        """Of what memory allows."""
        return self.streamed / self.limit


class Bench:
    """Inputs and outputs of all kernels, larger than the caches, and one block's scratch."""

    def __init__(self, rows: int) -> None:
        self.weights = rows * COLUMNS
        values = np.random.default_rng(1).standard_normal((BLOCK_ROWS, COLUMNS)).astype(np.float32) * np.float32(0.02)
        self.values = np.resize(values, (rows, COLUMNS))
        self.bits = np.empty((rows, COLUMNS), np.uint16)
        floats.narrow_bfloat16(self.values.reshape(-1).view(np.uint32), self.bits.reshape(-1))
        self.restored = np.zeros((rows, COLUMNS), np.uint16)
        self.codes = np.zeros((rows, COLUMNS), np.int8)
        self.words = np.zeros((rows, COLUMNS // 4), np.int32)
        self.pairs = np.zeros((rows, COLUMNS // 2), np.uint8)
        self.absmax = np.zeros((rows, COLUMNS // NF4_BLOCK), np.float32)
        four_bit.block_absmax(self.bits.reshape(-1), NF4_BLOCK, self.absmax.reshape(-1))
        self.new_absmax = np.zeros_like(self.absmax)
        left, right = values[:, :RANK].copy(), values[:RANK].copy()
        self.delta = LoadedProduct((RowFactors(0, left, right),), np.float32(0.01))
        self.scales = np.full((rows, 1), 1e-3, np.float32)
        self.group_scales = np.full((rows, COLUMNS // 128), 1e-3, np.float32)
        self.zeros = np.zeros((rows, COLUMNS // 128), np.int8)
        self.block = np.empty((BLOCK_ROWS, COLUMNS), np.float32)
        self.block_codes = np.empty((BLOCK_ROWS, COLUMNS), np.int8)

    def kernels(self) -> dict[str, Kernel]:
        """All of them, in the order of the table."""
        return {
            "bf16 widen": Kernel(self.widen_to_memory, 6),
            "bf16 narrow": Kernel(self.narrow_from_memory, 6),
            "nf4 encode of bf16": Kernel(self.nf4_encode, 2.5 + 4 / NF4_BLOCK),
            "fp4 encode of bf16": Kernel(self.fp4_encode, 2.5 + 4 / NF4_BLOCK),
            "nf4 absmax of bf16": Kernel(self.nf4_absmax, 2 + 4 / NF4_BLOCK),
            "nf4 round trip of bf16": Kernel(self.nf4_round_trip, 2 + 8 / NF4_BLOCK),
            "rank-16 delta, in cache": Kernel(self.low_rank, 4 * RANK / BLOCK_ROWS),
            "round trip + delta, to bf16": Kernel(self.merge_to_bfloat16, 4 + 8 / NF4_BLOCK),
            "round trip + delta, to nf4": Kernel(self.merge_to_nf4, 2.5 + 12 / NF4_BLOCK),
            "nf4 decode": Kernel(self.nf4_decode, 4.5 + 4 / NF4_BLOCK),
            "double quantisation": Kernel(self.double_quantisation, 5 / NF4_BLOCK),
            "row absmax": Kernel(self.row_absmax, 4),
            "int4 g128 of bf16, packed": Kernel(self.int4_encode, 2.5 + 4 / 128),
            "int4 g128 to bf16": Kernel(self.int4_decode, 2.5 + 5 / 128),
            "int8 rows of bf16": Kernel(self.int8_encode, 3),
            "fp8 rows of bf16": Kernel(self.float8_encode, 3),
            "fp8 rows to bf16": Kernel(self.float8_decode, 3),
            "pack 4 bits": Kernel(self.pack4, 1.5),
            "unpack 4 bits": Kernel(self.unpack4, 1.5),
            "pack 8 bits": Kernel(self.pack8, 2),
        }

    def widened(self, rows: slice) -> floats.Float32:
        """A block of the input as float32, in cache."""
        source = self.bits[rows]
        block = self.block[: len(source)]
        floats.widen_bfloat16(source.reshape(-1), block.reshape(-1).view(np.uint32))
        return block

    def narrowed(self, block: floats.Float32, rows: slice) -> None:
        """A block of float32 to bf16 in memory."""
        floats.narrow_bfloat16(block.reshape(-1).view(np.uint32), self.restored[rows].reshape(-1))

    def widen_to_memory(self, rows: slice) -> None:
        floats.widen_bfloat16(self.bits[rows].reshape(-1), self.values[rows].reshape(-1).view(np.uint32))

    def narrow_from_memory(self, rows: slice) -> None:
        self.narrowed(self.values[rows], rows)

    def encode_four_bit(self, rows: slice, grid: four_bit.FourBitGrid) -> None:
        bits, absmax = self.bits[rows].reshape(-1), self.absmax[rows].reshape(-1)
        four_bit.block_absmax(bits, NF4_BLOCK, absmax)
        four_bit.encode(bits, absmax, NF4_BLOCK, grid, self.pairs[rows].reshape(-1))

    def nf4_encode(self, rows: slice) -> None:
        self.encode_four_bit(rows, four_bit.NF4)

    def fp4_encode(self, rows: slice) -> None:
        self.encode_four_bit(rows, four_bit.FP4)

    def nf4_absmax(self, rows: slice) -> None:
        four_bit.block_absmax(self.bits[rows].reshape(-1), NF4_BLOCK, self.absmax[rows].reshape(-1))

    def merged(self, rows: slice) -> floats.Float32:
        """A block as training saw it, with a delta of rank 16 added."""
        bits, absmax = self.bits[rows].reshape(-1), self.absmax[rows].reshape(-1)
        block = self.block[: len(self.bits[rows])]
        four_bit.round_trip(bits, absmax, absmax, NF4_BLOCK, four_bit.NF4, block.reshape(-1))
        floats.round_bfloat16(block.reshape(-1).view(np.uint32))
        self.delta.apply(block, 0)
        return block

    def nf4_round_trip(self, rows: slice) -> None:
        bits, absmax = self.bits[rows].reshape(-1), self.absmax[rows].reshape(-1)
        out = self.block[: len(self.bits[rows])].reshape(-1)
        four_bit.round_trip(bits, absmax, absmax, NF4_BLOCK, four_bit.NF4, out)

    def low_rank(self, rows: slice) -> None:
        self.delta.apply(self.block[: len(self.bits[rows])], 0)

    def merge_to_bfloat16(self, rows: slice) -> None:
        self.narrowed(self.merged(rows), rows)

    def merge_to_nf4(self, rows: slice) -> None:
        values, absmax = self.merged(rows).reshape(-1), self.new_absmax[rows].reshape(-1)
        four_bit.block_absmax(values, NF4_BLOCK, absmax)
        four_bit.encode(values, absmax, NF4_BLOCK, four_bit.NF4, self.pairs[rows].reshape(-1))

    def nf4_decode(self, rows: slice) -> None:
        pairs, out = self.pairs[rows].reshape(-1), self.values[rows].reshape(-1)
        four_bit.decode(pairs, self.absmax[rows].reshape(-1), NF4_BLOCK, four_bit.NF4.codebook, out)

    def double_quantisation(self, rows: slice) -> None:
        absmax = self.absmax[rows].reshape(-1)
        double_quant.encode(absmax, double_quant.mean(absmax))

    def row_absmax(self, rows: slice) -> None:
        scales.absmax(self.values[rows], self.scales[rows])

    def int4_encode(self, rows: slice) -> None:
        values = self.widened(rows)
        codes = self.block_codes[: len(values)]
        fitted, zeros = integers.fit(values, INT4)
        integers.encode(values, fitted, zeros, INT4, codes)
        packing.pack(codes, 4)
        self.group_scales[rows] = fitted

    def int4_decode(self, rows: slice) -> None:
        codes = packing.unpack(self.pairs[rows].view(np.int32), 4, self.codes.shape[1])
        block = self.block[: len(codes)]
        integers.decode(codes, self.group_scales[rows], self.zeros[rows], block)
        self.narrowed(block, rows)

    def int8_encode(self, rows: slice) -> None:
        values = self.widened(rows)
        fitted, zeros = integers.fit(values, INT8)
        integers.encode(values, fitted, zeros, INT8, self.codes[rows])

    def float8_encode(self, rows: slice) -> None:
        values = self.widened(rows)
        codes = self.codes[rows].view(np.uint8)
        float8.encode_e4m3(values, float8.fit_e4m3(values, "BF16"), "BF16", codes)

    def float8_decode(self, rows: slice) -> None:
        block = self.block[: len(self.codes[rows])]
        float8.decode_e4m3(self.codes[rows].view(np.uint8), self.scales[rows], block)
        self.narrowed(block, rows)

    def pack4(self, rows: slice) -> None:
        packing.pack(self.codes[rows], 4)

    def unpack4(self, rows: slice) -> None:
        packing.unpack(self.pairs[rows].view(np.int32), 4, self.codes.shape[1])

    def pack8(self, rows: slice) -> None:
        packing.pack(self.codes[rows], 8)


def best(work: Callable[[], object]) -> float:
    """Seconds of the fastest round, after one that compiles and touches every page."""
    work()
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def bandwidth(weights: int) -> float:
    """Bytes per second of a numpy copy, read and written."""
    source = np.ones(weights, np.float32)
    out = np.empty_like(source)
    return 2 * source.nbytes / best(lambda: np.copyto(out, source))


def measure(bench: Bench, bytes_per_second: float) -> dict[str, Row]:
    """The table: every kernel over all weights, then over the first block."""
    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, bench.weights // COLUMNS, BLOCK_ROWS)]
    first = [blocks[0]] * min(len(blocks), 64)
    sizes = {"streamed": (blocks, bench.weights), "cached": (first, len(first) * bench.bits[blocks[0]].size)}
    rows = {}
    for name, kernel in bench.kernels().items():
        speeds = {}
        for column, (parts, weights) in sizes.items():

            def walk(kernel: Kernel = kernel, parts: list[slice] = parts) -> None:
                for part in parts:
                    kernel.work(part)

            speeds[column] = weights / best(walk)
        rows[name] = Row(
            **speeds, limit=bytes_per_second / kernel.bytes_per_weight, bytes_per_weight=kernel.bytes_per_weight
        )
    return rows


def with_compressed_tensors(weight: torch.Tensor, arguments: QuantizationArgs, packed: bool) -> None:
    """Scales, codes and words as that library makes them."""
    groups = weight.unflatten(-1, (-1, arguments.group_size or COLUMNS))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    codes = quantize(weight, scale, zero, arguments, dtype=arguments.pytorch_dtype())
    if packed:
        pack_to_int32(codes, 4)


def measure_peers(bench: Bench) -> dict[str, float]:
    """Weights per second of the libraries, on a part of the weights: they need several times the memory."""
    rows = min(len(bench.bits), 2048)
    weight = torch.from_numpy(bench.bits[:rows].view(np.int16)).view(torch.bfloat16)
    int4 = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=128)
    int8 = QuantizationArgs(num_bits=8, type="int", strategy="channel")
    fp8 = QuantizationArgs(num_bits=8, type="float", strategy="channel")
    works: dict[str, Callable[[], object]] = {
        "nf4 bitsandbytes": lambda: bnb.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4"),
        "int4 compressed-tensors": lambda: with_compressed_tensors(weight, int4, packed=True),
        "int8 compressed-tensors": lambda: with_compressed_tensors(weight, int8, packed=False),
        "fp8 compressed-tensors": lambda: with_compressed_tensors(weight, fp8, packed=False),
    }
    torch.set_num_threads(1)
    return {name: weight.numel() / best(work) for name, work in works.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, default=2**26)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bench = Bench(max(1, round(options.weights / COLUMNS)))
    bytes_per_second = bandwidth(bench.weights)
    rows = measure(bench, bytes_per_second)
    peers = measure_peers(bench)
    ratios = {
        "nf4_encode_vs_bitsandbytes": rows["nf4 encode of bf16"].streamed / peers["nf4 bitsandbytes"],
        "int4_encode_vs_compressed_tensors": rows["int4 g128 of bf16, packed"].streamed
        / peers["int4 compressed-tensors"],
        "int8_encode_vs_compressed_tensors": rows["int8 rows of bf16"].streamed / peers["int8 compressed-tensors"],
        "fp8_encode_vs_compressed_tensors": rows["fp8 rows of bf16"].streamed / peers["fp8 compressed-tensors"],
    }
    if options.json:
        table = {name: asdict(row) | {"share": row.share} for name, row in rows.items()}
        data = {"weights": bench.weights, "copy_bytes_per_second": bytes_per_second}
        print(json.dumps(data | ratios | {"rows": table, "peers": peers}, indent=2))
        return
    print(f"{bench.weights / 1e6:.0f} M weights, one thread, numpy copy {bytes_per_second / 1e9:.1f} GB/s; M weights/s")
    print(f"{'':<28} {'streamed':>9} {'cached':>9} {'limit':>9} {'share':>6} {'bytes':>6}")
    for name, row in rows.items():
        speeds = " ".join(f"{speed / 1e6:9.0f}" for speed in (row.streamed, row.cached, row.limit))
        print(f"{name:<28} {speeds} {row.share:6.2f} {row.bytes_per_weight:6.2f}")
    for name, speed in peers.items():
        print(f"{name:<28} {speed / 1e6:9.0f}")
    for name, ratio in ratios.items():
        print(f"{name:<36} {ratio:8.1f}")


if __name__ == "__main__":
    main()
