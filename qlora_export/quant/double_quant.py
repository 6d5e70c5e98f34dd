"""Double quantisation: the absmax of NF4 blocks as 8-bit codes of a signed dynamic map, in blocks of 256.

    offset = mean(absmax),  code = nearest(MAP, (absmax - offset) * (1 / nested_absmax)),
    absmax = MAP[code] * nested_absmax + offset

Byte for byte as bitsandbytes 0.50 on a CPU: its nearest code comes from a table of 65,536 steps over [-1, 1], which
misses the true nearest for about one value in 700; CUDA searches exactly. Both are here, since which one an adapter
saw depends on where it was trained. The mean is torch's sum of one thread (cascade sums over four rows of eight
lanes), whatever machine this runs on. Source: bitsandbytes `csrc/cpu_ops.cpp`, PyTorch `SumKernel.cpp`,
8-bit dynamic types (arXiv 1511.04561). Cost: one pass over size / 64 values.
"""

from __future__ import annotations

from functools import cache

import numba
import numpy as np
from numpy.typing import NDArray

from qlora_export.quant.floats import Float32, UInt8

BLOCK = 256
TABLE_STEPS = 65536
LANES = 8
ROWS = 4


def _linear_space(count: int) -> NDArray[np.float64]:
    """torch.linspace(0.1, 1, count) in float32: steps from both ends towards the middle."""
    start, end = np.float32(0.1), np.float32(1)
    step = np.float32((end - start) / np.float32(count - 1))
    index = np.arange(count, dtype=np.float64)
    from_start = np.float64(start) + np.float64(step) * index
    from_end = np.float64(end) - np.float64(step) * (count - 1 - index)
    return np.where(index < count // 2, from_start, from_end).astype(np.float32)


@cache
def dynamic_map() -> Float32:
    """The 256 sorted values of bitsandbytes' signed dynamic 8-bit map."""
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        edges = _linear_space(2**exponent + 1).astype(np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        magnitudes = np.float32(10.0 ** (exponent - 6)) * means
        values += [*magnitudes.tolist(), *(-magnitudes).tolist()]
    return np.array(sorted(values), dtype=np.float32)


@cache
def _midpoints() -> Float32:
    codes = dynamic_map()
    middles: Float32 = np.float32(0.5) * (codes[:-1] + codes[1:])
    return middles


@cache
def _table() -> UInt8:
    """Nearest code of each of the table's steps."""
    steps = np.arange(TABLE_STEPS, dtype=np.float32)
    values = np.float32(-1) + np.float32(2) * steps / np.float32(TABLE_STEPS - 1)
    return np.searchsorted(_midpoints(), values, side="left").astype(np.uint8)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _cascade(values: Float32) -> Float32:
    """Cascade sum of [count, width] over the first axis; four levels keep the rounding error logarithmic."""
    count, width = values.shape
    power = 0
    while (1 << power) < count:
        power += 1
    power = max(4, power // 4)
    step = 1 << power
    sums = np.zeros((4, width), np.float32)
    row = 0
    while row + step <= count:
        for _ in range(step):
            for lane in range(width):
                sums[0, lane] += values[row, lane]
            row += 1
        for level in range(1, 4):
            for lane in range(width):
                sums[level, lane] += sums[level - 1, lane]
                sums[level - 1, lane] = np.float32(0)
            if row & ((step - 1) << (level * power)):
                break
    while row < count:
        for lane in range(width):
            sums[0, lane] += values[row, lane]
        row += 1
    for level in range(1, 4):
        for lane in range(width):
            sums[0, lane] += sums[level, lane]
    total: Float32 = sums[0]
    return total


def mean(values: Float32) -> np.float32:
    """Mean of flat float32 values as torch computes it with one thread."""
    width = LANES if values.size >= LANES else 1
    vectors = values.size // width
    bundles = vectors // ROWS
    sums = _cascade(values[: bundles * ROWS * width].reshape(bundles, ROWS * width)).reshape(ROWS, width)
    lanes = sums[0].copy()
    for vector in range(bundles * ROWS, vectors):
        lanes += values[vector * width : (vector + 1) * width]
    for row in range(1, ROWS):
        lanes += sums[row]
    total = np.float32(0)
    for value in values[vectors * width :]:
        total += value
    for lane in lanes:
        total += lane
    return np.float32(total / np.float32(values.size))


def encode(absmax: Float32, offset: np.float32, exact: bool = False) -> tuple[UInt8, Float32]:
    """Codes (uint8, one per absmax) and nested absmax (float32, one per 256) of `absmax - offset`.

    `exact` searches the true nearest code, as CUDA does; otherwise bitsandbytes' CPU table decides.
    """
    codes = np.empty(absmax.size, np.uint8)
    nested_absmax = np.empty(-(-absmax.size // BLOCK), np.float32)
    _encode(absmax, np.float32(offset), _midpoints(), _table(), exact, codes, nested_absmax)
    return codes, nested_absmax


def codes_on(absmax: Float32, nested_absmax: Float32, offset: np.float32) -> UInt8:
    """The nearest codes, searched exactly, on a second level that is given."""
    codes = np.empty(absmax.size, np.uint8)
    _encode_on(absmax, np.float32(offset), _midpoints(), nested_absmax, codes)
    return codes


def decode(
    codes: UInt8, nested_absmax: Float32, offset: np.float32, first: int = 0, codebook: Float32 | None = None
) -> Float32:
    """The float32 absmax that the codes stand for; `codes` begins at absmax number `first` of the tensor."""
    absmax = np.empty(codes.size, np.float32)
    _decode(codes, nested_absmax, np.float32(offset), first, dynamic_map() if codebook is None else codebook, absmax)
    return absmax


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _encode(
    absmax: Float32,
    offset: np.float32,
    midpoints: Float32,
    table: UInt8,
    exact: bool,
    codes: UInt8,
    nested_absmax: Float32,
) -> None:
    for block in range(nested_absmax.size):
        values, into = absmax[block * BLOCK : (block + 1) * BLOCK], codes[block * BLOCK : (block + 1) * BLOCK]
        largest = np.float32(0)
        for index in range(values.size):
            largest = max(largest, abs(values[index] - offset))
        nested_absmax[block] = largest
        if largest == 0:
            into[:] = 0
            continue
        reciprocal = np.float32(1) / largest
        for index in range(values.size):
            scaled = min(max((values[index] - offset) * reciprocal, np.float32(-1)), np.float32(1))
            if exact:
                into[index] = _below(midpoints, scaled)
            else:
                step = (scaled + np.float32(1)) * np.float32(0.5) * np.float32(TABLE_STEPS - 1) + np.float32(0.5)
                into[index] = table[np.uint16(np.int32(step))]


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _encode_on(absmax: Float32, offset: np.float32, midpoints: Float32, nested_absmax: Float32, codes: UInt8) -> None:
    for index in range(absmax.size):
        largest = nested_absmax[index // BLOCK]
        codes[index] = _below(midpoints, (absmax[index] - offset) / largest) if largest > 0 else np.uint8(0)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _below(midpoints: Float32, value: np.float32) -> np.uint8:
    """How many of the 255 midpoints are below a value."""
    count, step = 0, 128
    while step:
        count += step if midpoints[count + step - 1] < value else 0
        step >>= 1
    return np.uint8(count)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _decode(
    codes: UInt8, nested_absmax: Float32, offset: np.float32, first: int, codebook: Float32, absmax: Float32
) -> None:
    for index in range(codes.size):
        absmax[index] = codebook[codes[index]] * nested_absmax[(first + index) // BLOCK] + offset
