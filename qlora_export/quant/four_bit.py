"""NF4 and FP4: 4-bit codes in blocks of values with one absmax each, byte for byte as bitsandbytes 0.50 on a CPU.

    absmax_b = max |w|,  code = #{midpoints m : m < clamp(w * (1 / absmax_b), -1, 1)},  value = levels[code] * scale_b

Values are taken in row-major order; a block may run over row ends. They come as float32, or as the bits of bf16, which
are widened in registers. Two codes share a byte, the first in the high nibble. A last, short block divides by its
absmax where full blocks multiply by the reciprocal, and an absmax below 1e-38 counts as 1e-38. FP4 is the same search
over its levels in ascending order; a table then gives the codes that bitsandbytes numbers them by. Sources: QLoRA
(arXiv 2305.14314), bitsandbytes `backends/default/ops.py`, `functional.get_4bit_type`. Cost: one pass over memory for
each function; the search takes four comparisons a weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from qlora_export.quant.floats import Float32, UInt8, UInt16, float32_bits, float32_of

SMALLEST = np.float32(1e-38)
# Blocks hold whole pieces; a loop over a piece has a known length and is unrolled into vectors.
PIECE = 32
# Codes of so many blocks are packed at once: long enough for vectors, short enough for the first-level cache.
GROUP_BLOCKS = 32
Values = Float32 | UInt16


@dataclass(frozen=True)
class FourBitGrid:
    """The 16 levels of a 4-bit code: `codebook` by code, `levels` and the 15 `midpoints` between them ascending.

    `renumber` maps a byte of two ascending numbers to the byte of their codes, where these are not the same.
    """

    name: str
    codebook: Float32
    levels: Float32
    midpoints: Float32
    renumber: UInt8 | None


def _grid(name: str, codebook: list[float]) -> FourBitGrid:
    values = np.array(codebook, np.float32)
    order = np.argsort(values, kind="stable").astype(np.uint8)
    levels = values[order]
    pairs = (order[:, None] << 4 | order[None, :]).reshape(-1).astype(np.uint8)
    ascending = bool((order == np.arange(16)).all())
    midpoints: Float32 = (levels[:-1] + levels[1:]) / np.float32(2)
    return FourBitGrid(name, values, levels, midpoints, None if ascending else pairs)


NF4 = _grid(
    "nf4",
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
)
FP4 = _grid("fp4", [sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)])
GRIDS = {grid.name: grid for grid in (NF4, FP4)}


def rows_of_whole_blocks(columns: int, block: int) -> int:
    """Fewest rows of so many columns that hold whole blocks."""
    return block // math.gcd(block, columns)


def encode(values: Values, absmax: Float32, block: int, grid: FourBitGrid, out: UInt8) -> None:
    """Pack the nearest codes of flat `values` into `out`, ceil(size / 2) bytes; `absmax` is from `block_absmax`."""
    whole = values.size // block * block
    _encode(values[:whole], absmax, block, grid.midpoints, out)
    if whole < values.size:
        _encode_short(values[whole:], absmax[-1], grid.midpoints, out[whole // 2 :])
    if grid.renumber is not None:
        _renumber(grid.renumber, out)


def pack(numbers: UInt8, grid: FourBitGrid) -> UInt8:
    """Numbers of ascending levels, flat, as packed codes: ceil(size / 2) bytes."""
    whole = numbers if numbers.size % 2 == 0 else np.append(numbers, grid.midpoints.searchsorted(0).astype(np.uint8))
    packed: UInt8 = (whole[::2] << np.uint8(4)) | whole[1::2]
    if grid.renumber is not None:
        _renumber(grid.renumber, packed)
    return packed


def unpack(packed: UInt8, size: int, grid: FourBitGrid) -> UInt8:
    """The numbers of ascending levels that packed codes stand for, flat."""
    codes = np.stack([packed >> np.uint8(4), packed & np.uint8(15)], axis=1).reshape(-1)[:size]
    return np.searchsorted(grid.levels, grid.codebook[codes]).astype(np.uint8)


def round_trip(values: Values, absmax: Float32, scales: Float32, block: int, grid: FourBitGrid, out: Float32) -> None:
    """Encode and decode flat `values` into `out` without storing codes; `scales` are what the absmax decode to."""
    whole = values.size // block * block
    _round_trip(values[:whole], absmax, scales, block, grid.midpoints, grid.levels, out)
    if whole < values.size:
        codes = np.empty((values.size - whole + 1) // 2, np.uint8)
        _encode_short(values[whole:], absmax[-1], grid.midpoints, codes)
        decode(codes, scales[-1:], block, grid.levels, out[whole:])


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def block_absmax(values: Values, block: int, out: Float32) -> None:
    """Largest magnitude of every block of flat `values` into `out`; the last block may be short.

    A block with NaN in it gets NaN, one with infinity infinity. Magnitudes compare as their bits do.
    """
    largest = out.view(np.uint32)
    for index in range(out.size):
        part = values[index * block : (index + 1) * block]
        most = np.uint32(0)
        for position in range(part.size):
            most = np.uint32(max(most, np.uint32(float32_bits(part[position]) & np.uint32(0x7FFFFFFF))))
        largest[index] = most
    if out.size * block > values.size:
        out[-1] = max(out[-1], SMALLEST) if out[-1] == out[-1] else out[-1]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def decode(codes: UInt8, scales: Float32, block: int, codebook: Float32, out: Float32) -> None:
    """Unpack codes into flat float32 `out`; `scales` holds one float32 per block, `codebook` the 16 values."""
    for index in range(scales.size):
        start = index * block
        stop = min(start + block, out.size)
        scale = scales[index]
        for position in range(start, stop - 1, 2):
            pair = codes[position // 2]
            out[position] = codebook[pair >> 4] * scale
            out[position + 1] = codebook[pair & 15] * scale
        if (stop - start) % 2:
            out[stop - 1] = codebook[codes[stop // 2] >> 4] * scale


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _search(scaled: np.float32, m: Any) -> tuple[bool, bool, bool, bool]:
    """The bits of the number of midpoints below a value, highest first: a search that halves what is left."""
    eight = scaled > m[7]
    a = m[8] if eight else m[0]
    b = m[9] if eight else m[1]
    c = m[10] if eight else m[2]
    d = m[11] if eight else m[3]
    e = m[12] if eight else m[4]
    f = m[13] if eight else m[5]
    g = m[14] if eight else m[6]
    four = scaled > d
    a = e if four else a
    b = f if four else b
    c = g if four else c
    two = scaled > b
    a = c if two else a
    return eight, four, two, scaled > a


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def nearest_number(scaled: np.float32, m: Any) -> np.uint8:
    eight, four, two, one = _search(scaled, m)
    number = np.uint8(8) if eight else np.uint8(0)
    number += np.uint8(4) if four else np.uint8(0)
    number += np.uint8(2) if two else np.uint8(0)
    number += np.uint8(1) if one else np.uint8(0)
    return number


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _level(scaled: np.float32, m: Any, v: Any) -> Any:
    eight, four, two, one = _search(scaled, m)
    a = v[8] if eight else v[0]
    b = v[9] if eight else v[1]
    c = v[10] if eight else v[2]
    d = v[11] if eight else v[3]
    e = v[12] if eight else v[4]
    f = v[13] if eight else v[5]
    g = v[14] if eight else v[6]
    h = v[15] if eight else v[7]
    a = e if four else a
    b = f if four else b
    c = g if four else c
    d = h if four else d
    a = c if two else a
    b = d if two else b
    return b if one else a


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def fifteen(m: Float32) -> Any:
    """As a tuple, which stays in registers."""
    return m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7], m[8], m[9], m[10], m[11], m[12], m[13], m[14]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _encode(values: Values, absmax: Float32, block: int, midpoints: Float32, out: UInt8) -> None:
    m = fifteen(midpoints)
    scratch = np.empty(GROUP_BLOCKS * block, np.uint8)
    for group in range(0, values.size // block, GROUP_BLOCKS):
        source = values[group * block : (group + GROUP_BLOCKS) * block]
        numbers = scratch[: source.size]
        for index in range(source.size // block):
            reciprocal = np.float32(1) / max(absmax[group + index], SMALLEST)
            for first in range(index * block, (index + 1) * block, PIECE):
                part, into = source[first : first + PIECE], numbers[first : first + PIECE]
                for position in range(PIECE):
                    into[position] = nearest_number(float32_of(part[position]) * reciprocal, m)
        packed = out[group * block // 2 : (group * block + source.size) // 2]
        for pair in range(packed.size):
            packed[pair] = np.uint8((numbers[2 * pair] << np.uint8(4)) | numbers[2 * pair + 1])


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _renumber(table: UInt8, out: UInt8) -> None:
    for index in range(out.size):
        out[index] = table[out[index]]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _encode_short(values: Values, largest: np.float32, midpoints: Float32, out: UInt8) -> None:
    m = fifteen(midpoints)
    for pair in range(out.size):
        high = nearest_number(float32_of(values[2 * pair]) / largest, m)
        low = nearest_number(np.float32(0), m)
        if 2 * pair + 1 < values.size:
            low = nearest_number(float32_of(values[2 * pair + 1]) / largest, m)
        out[pair] = np.uint8((high << np.uint8(4)) | low)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _round_trip(
    values: Values, absmax: Float32, scales: Float32, block: int, midpoints: Float32, levels: Float32, out: Float32
) -> None:
    m, v = fifteen(midpoints), (*fifteen(levels), levels[15])
    for index in range(values.size // block):
        reciprocal, scale = np.float32(1) / max(absmax[index], SMALLEST), scales[index]
        for first in range(index * block, (index + 1) * block, PIECE):
            part, into = values[first : first + PIECE], out[first : first + PIECE]
            for position in range(PIECE):
                into[position] = _level(float32_of(part[position]) * reciprocal, m, v) * scale
