"""NF4: 4-bit codes in blocks of 64 values with one absmax each, byte for byte as bitsandbytes 0.50 on a CPU.

    absmax_b = max |w|,  code = #{midpoints m : m < clamp(w * (1 / absmax_b), -1, 1)},  value = NF4[code] * scale_b

Values are taken in row-major order; a block may run over row ends. Two codes share a byte, the first in the high
nibble. A last block of fewer than 64 values divides by its absmax where full blocks multiply by the reciprocal, and an
absmax below 1e-38 counts as 1e-38. Source: QLoRA (arXiv 2305.14314) and bitsandbytes `backends/default/ops.py`.
Cost: one pass over memory for `block_absmax`, one for `encode`; 15 comparisons a weight.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from qlora_export.quant.floats import Float32, UInt8

CODEBOOK: Float32 = np.array(
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
    dtype=np.float32,
)
MIDPOINTS: Float32 = (CODEBOOK[:-1] + CODEBOOK[1:]) / np.float32(2)
SMALLEST = np.float32(1e-38)


def rows_of_whole_blocks(columns: int, block: int) -> int:
    """Fewest rows of so many columns that hold whole blocks."""
    return block // math.gcd(block, columns)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def block_absmax(values: Float32, block: int, out: Float32) -> None:
    """Largest magnitude of every block of flat `values` into `out`; the last block may be short."""
    full = values.size // block
    for index in range(full):
        largest = np.float32(0)
        for position in range(index * block, (index + 1) * block):
            largest = max(largest, abs(values[position]))
        out[index] = largest
    if full * block < values.size:
        largest = SMALLEST
        for position in range(full * block, values.size):
            largest = max(largest, abs(values[position]))
        out[full] = largest


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _code(scaled: np.float32, midpoints: Float32) -> np.uint8:
    code = np.uint8(0)
    for midpoint in range(15):
        code += np.uint8(scaled > midpoints[midpoint])
    return code


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def encode(values: Float32, absmax: Float32, block: int, out: UInt8) -> None:
    """Pack the nearest codes of flat `values` into `out`, ceil(size / 2) bytes; `absmax` is from `block_absmax`."""
    midpoints = MIDPOINTS
    codes = np.empty(block, np.uint8)
    for index in range(absmax.size):
        start = index * block
        count = min(block, values.size - start)
        if count == block:
            scale = np.float32(1) / max(absmax[index], SMALLEST)
            for position in range(block):
                scaled = values[start + position] * scale
                code = np.uint8(0)
                for midpoint in range(15):
                    code += np.uint8(scaled > midpoints[midpoint])
                codes[position] = code
        else:
            for position in range(count):
                codes[position] = _code(values[start + position] / absmax[index], midpoints)
            if count % 2:
                codes[count] = _code(np.float32(0), midpoints)
        for pair in range((count + 1) // 2):
            out[start // 2 + pair] = (codes[2 * pair] << 4) | codes[2 * pair + 1]


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
