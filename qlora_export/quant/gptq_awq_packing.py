"""4-bit codes of weights [out, in], packed for readers that hold them [in, out]: GPTQ along `in`, AWQ along `out`.

    along inputs:    word [in / 8, out]  = sum over i of nibble[out, 8 * word + i] << 4 i
    along outputs:   word [in, out / 8]  = sum over i of nibble[8 * word + order[i], in] << 4 i

A nibble is the code plus 8. `order` is 0..7 for GPTQ's zero points and 0, 2, 4, 6, 1, 3, 5, 7 for all of AWQ. A row
block fills some columns of every row of words, so the words of a whole tensor wait in memory, half a byte a weight.
Sources: AutoGPTQ `qlinear_cuda.pack`, AutoAWQ `modules/linear/gemm.py`. Cost: one pass, eight codes a word.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from qlora_export.quant.floats import UInt32
from qlora_export.quant.scales import Int8

PER_WORD = 8
PLAIN_ORDER: NDArray[np.int64] = np.arange(PER_WORD)
AWQ_ORDER: NDArray[np.int64] = np.array([0, 2, 4, 6, 1, 3, 5, 7])


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def pack_inputs(codes: Int8, first: int, out: UInt32) -> None:
    """Codes [rows, in] into columns `first`... of `out` [in / 8, all rows]."""
    rows = codes.shape[0]
    for line in range(out.shape[0]):
        target = out[line, first : first + rows]
        for row in range(rows):
            part = codes[row, 8 * line : 8 * line + 8]
            word = np.uint32(0)
            for index in range(8):
                nibble = np.uint32(np.uint8(part[index]) & np.uint8(15))
                word = np.uint32(word | np.uint32(nibble << np.uint32(4 * index)))
            target[row] = np.uint32(word ^ np.uint32(0x88888888))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def unpack_inputs(packed: UInt32, out: Int8) -> None:
    """Codes `out` [rows, in] of columns [in / 8, rows]."""
    for line in range(packed.shape[0]):
        for row in range(out.shape[0]):
            word = packed[line, row]
            for index in range(8):
                nibble = np.uint32(np.uint32(word >> np.uint32(4 * index)) & np.uint32(15))
                out[row, 8 * line + index] = np.int8(np.int32(nibble) - 8)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def pack_outputs(codes: Int8, first: int, order: NDArray[np.int64], out: UInt32) -> None:
    """Codes [rows, in] into columns `first / 8`... of `out` [in, all rows / 8]; both are multiples of 8."""
    for line in range(codes.shape[0] // 8):
        block = codes[8 * line : 8 * line + 8]
        for column in range(codes.shape[1]):
            word = np.uint32(0)
            for index in range(8):
                nibble = np.uint32(np.uint8(block[order[index], column]) & np.uint8(15))
                word = np.uint32(word | np.uint32(nibble << np.uint32(4 * index)))
            out[column, first // 8 + line] = np.uint32(word ^ np.uint32(0x88888888))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def unpack_outputs(packed: UInt32, order: NDArray[np.int64], out: Int8) -> None:
    """Codes `out` [rows, in] of columns [in, rows / 8]."""
    for line in range(out.shape[0] // 8):
        for column in range(out.shape[1]):
            word = packed[column, line]
            for index in range(8):
                nibble = np.uint32(np.uint32(word >> np.uint32(4 * index)) & np.uint32(15))
                out[8 * line + order[index], column] = np.int8(np.int32(nibble) - 8)
