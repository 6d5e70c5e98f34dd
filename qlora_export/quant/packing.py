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
        target[(columns + 1) // 2 :] = 0


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _pack8(codes: Int8, out: UInt8) -> None:
    rows, columns = codes.shape
    for row in range(rows):
        source, target = codes[row], out[row]
        for index in range(columns):
            target[index] = np.uint8(source[index]) ^ np.uint8(0x80)
        target[columns:] = 0


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


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _unpack8(packed: UInt8, out: Int8) -> None:
    rows, columns = out.shape
    for row in range(rows):
        source, target = packed[row], out[row]
        for index in range(columns):
            target[index] = np.int8(source[index] ^ np.uint8(0x80))


def pack(codes: Int8, bits: int, out: Int32) -> None:
    """Pack codes [rows, columns] into `out` [rows, words(columns, bits)]."""
    (_pack4 if bits == 4 else _pack8)(codes, out.view(np.uint8))


def unpack(packed: Int32, bits: int, out: Int8) -> None:
    """Unpack [rows, words] into codes `out` [rows, columns]."""
    (_unpack4 if bits == 4 else _unpack8)(packed.view(np.uint8), out)


def pack_down(zeros: Int8, bits: int) -> Int32:
    """Zero points [rows, groups] as words [words(rows, bits), groups]."""
    rows, groups = zeros.shape
    out = np.empty((groups, words(rows, bits)), np.int32)
    pack(np.ascontiguousarray(zeros.T), bits, out)
    return np.ascontiguousarray(out.T)


def unpack_down(packed: Int32, bits: int, rows: int) -> Int8:
    """Zero points [rows, groups] of words [words(rows, bits), groups]."""
    out = np.empty((packed.shape[1], rows), np.int8)
    unpack(np.ascontiguousarray(packed.T), bits, out)
    return np.ascontiguousarray(out.T)
