"""4- and 8-bit codes packed into int32 words, byte for byte as compressed-tensors 0.20's `pack_to_int32`.

    word = sum over i of (code_i + 2^(b-1)) << (b * i),   little-endian, 32 / b codes of one row in a word

A row begins a new word; what is left of its last word is zero bits. Zero points are packed the same way, but down the
rows: word [i, group] holds 32 / b consecutive rows, so a row block that is packed by itself holds a multiple of
`CODES_PER_WORD` rows. Adding half the range to a b-bit code is flipping its highest bit, so no sum can carry.
Source: compressed-tensors `compressors/pack_quantized/helpers.py`. Cost: one pass over memory.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from qlora_export.quant.floats import UInt8
from qlora_export.quant.scales import Int8

Int32 = NDArray[np.int32]
CODES_PER_WORD = {4: 8, 8: 4}
HIGHEST_BIT = np.uint8(0x80)


def words(codes: int, bits: int) -> int:
    """Number of int32 words of so many codes."""
    return -(-codes // CODES_PER_WORD[bits])


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _pack4(codes: Int8, out: UInt8) -> None:
    rows, columns = codes.shape
    for row in range(rows):
        source, target = codes[row], out[row]
        for pair in range(columns // 2):
            low, high = np.uint8(source[2 * pair]) & 15, np.uint8(source[2 * pair + 1]) & 15
            target[pair] = np.uint8((low | (high << 4)) ^ 0x88)
        if columns % 2:
            target[columns // 2] = np.uint8((source[columns - 1] & 15) ^ 8)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _unpack4(packed: UInt8, out: Int8) -> None:
    rows, columns = out.shape
    for row in range(rows):
        source, target = packed[row], out[row]
        for pair in range(columns // 2):
            target[2 * pair] = np.int8((source[pair] & 15) - 8)
            target[2 * pair + 1] = np.int8((source[pair] >> 4) - 8)
        if columns % 2:
            target[columns - 1] = np.int8((source[columns // 2] & 15) - 8)


def pack(codes: Int8, bits: int) -> Int32:
    """Codes [rows, columns] as words [rows, words(columns, bits)]."""
    rows, columns = codes.shape
    out = np.zeros((rows, words(columns, bits)), np.int32)
    raw = out.view(np.uint8)
    if bits == 4:
        _pack4(codes, raw)
    else:
        np.bitwise_xor(codes.view(np.uint8), HIGHEST_BIT, out=raw[:, :columns])
    return out


def unpack(packed: Int32, bits: int, columns: int) -> Int8:
    """Codes [rows, columns] of words [rows, words(columns, bits)]."""
    out = np.empty((len(packed), columns), np.int8)
    raw = packed.view(np.uint8)
    if bits == 4:
        _unpack4(raw, out)
    else:
        np.bitwise_xor(raw[:, :columns], HIGHEST_BIT, out=out.view(np.uint8))
    return out


def pack_down(zeros: Int8, bits: int) -> Int32:
    """Zero points [rows, groups] as words [words(rows, bits), groups]."""
    return np.ascontiguousarray(pack(np.ascontiguousarray(zeros.T), bits).T)


def unpack_down(packed: Int32, bits: int, rows: int) -> Int8:
    """Zero points [rows, groups] of words [words(rows, bits), groups]."""
    return np.ascontiguousarray(unpack(np.ascontiguousarray(packed.T), bits, rows).T)
