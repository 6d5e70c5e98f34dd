"""Unbiased rounding of a delta onto 4-bit codes that are there already: each lands above or below by chance.

    place = level[code] + delta / scale          between levels l below and h above:
    P(h) = (place - l) / (h - l),                so that E[level] = place

Where a place would lie beyond the outermost level, the scale of its block grows until it does not. A delta of zero
leaves code and scale as they are. Random numbers are counted, not drawn in turn: that of value i is the i-th of
SplitMix64 begun at a key of seed and tensor name, so bytes depend on no order of work. Levels are those of NF4, whose
codes ascend. Source: stochastic rounding; SplitMix64 (Steele, Lea, Flood 2014). Cost: one pass, about 30 operations a
weight.
"""

from __future__ import annotations

import hashlib

import numba
import numpy as np

from qlora_export.quant.floats import Float32, UInt8
from qlora_export.quant.four_bit import NF4


def key_of(seed: int, name: str) -> np.uint64:
    """Where the random numbers of a tensor begin."""
    return np.uint64(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little"))


def dither(codes: UInt8, scales: Float32, delta: Float32, block: int, key: np.uint64, first: int) -> UInt8:
    """New packed codes of whole blocks, the tensor's from value `first` on; `scales`, one a block, grow in place."""
    out = codes.copy()
    _dither(codes, scales, delta, block, NF4.levels, key, np.uint64(first), out)
    return out


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _uniform(key: np.uint64, index: np.uint64) -> np.float32:
    """Number `index` in [0, 1), of 24 bits."""
    mixed = np.uint64(key + (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    mixed = np.uint64(mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = np.uint64(mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = np.uint64(mixed ^ (mixed >> np.uint64(31)))
    return np.float32(mixed >> np.uint64(40)) * np.float32(2.0**-24)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _code(codes: UInt8, index: int) -> np.uint8:
    pair = codes[index // 2]
    return np.uint8(pair & 15) if index % 2 else np.uint8(pair >> 4)


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _dither(
    codes: UInt8,
    scales: Float32,
    delta: Float32,
    block: int,
    levels: Float32,
    key: np.uint64,
    first: np.uint64,
    out: UInt8,
) -> None:
    places = np.empty(block, np.float32)
    for number in range(scales.size):
        start = number * block
        count = min(block, delta.size - start)
        changed = False
        for index in range(start, start + count):
            changed = changed or delta[index] != 0
        if not changed:
            continue
        scale = scales[number]
        unit = scale if scale > 0 else np.float32(1)  # a block of zeros gets the scale of its delta
        reach = np.float32(1) if scale > 0 else np.float32(0)
        for index in range(count):
            base = levels[_code(codes, start + index)]
            places[index] = (base if scale > 0 else base * scale) + delta[start + index] / unit
            reach = max(reach, abs(places[index]))
        if reach > 1 or not scale > 0:
            scales[number] = unit * reach
        for index in range(count):
            place = places[index] / reach if reach > 0 else np.float32(0)
            below = 0
            for level in range(1, 15):
                below += 1 if levels[level] <= place else 0
            share = (place - levels[below]) / (levels[below + 1] - levels[below])
            chance = _uniform(key, first + np.uint64(start + index))
            code = np.uint8(below + 1) if chance < share else np.uint8(below)
            at = (start + index) // 2
            if (start + index) % 2:
                out[at] = np.uint8(out[at] & 240) | code
            else:
                out[at] = np.uint8(out[at] & 15) | np.uint8(code << 4)
