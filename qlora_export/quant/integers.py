"""Integer grids of 4 and 8 bits per group or per row, byte for byte as compressed-tensors 0.20 on a CPU.

    code = nearest(clamp(w / scale + zero, -2^(b-1), 2^(b-1) - 1)),   w' = (code - zero) * scale

The quotient and the sum are rounded to the weight's own dtype first, as the library computes in it: for bf16 weights
that rounding moves one code in 12 of 8 bits, one in 150 of 4. Symmetric grids have zeros for zero points. Values,
scales and zero points are [rows, columns], [rows, groups], [rows, groups]; scales are float32 values of the weight's
dtype. Rows are independent, so any cut into row blocks gives the same bytes. A last group that is short is refused, as
the library refuses it. Source: compressed-tensors `quantization/lifecycle/forward_helpers.py`.
Cost: one pass over memory to fit, one to encode; a division and twenty other operations a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from qlora_export.quant.floats import Float32, UInt8
from qlora_export.quant.precision import DROPPED_BITS, round_normal, to_int8
from qlora_export.quant.scales import Int8, asymmetric, extremes, group_absmax, symmetric


@dataclass(frozen=True)
class Grid:
    """An integer grid: 4 or 8 bits, columns of a group (None: the whole row), dtype of weight and scales."""

    bits: int
    group: int | None
    symmetric: bool = True
    dtype: str = "BF16"

    def groups(self, columns: int) -> int:
        """Number of groups of a row."""
        size = self.group or columns
        if columns % max(size, 1):
            raise ValueError(f"{columns} columns are no multiple of the group of {size}")
        return columns // max(size, 1)

    @property
    def levels(self) -> tuple[float, ...]:
        """All integers of so many bits around zero, ascending."""
        return tuple(float(level) for level in range(-self._half, self._half))

    def codes(self, numbers: UInt8) -> Int8:
        """The integers that numbers of levels stand for."""
        return (numbers.astype(np.int16) - self._half).astype(np.int8)

    def numbers(self, codes: Int8) -> UInt8:
        """The numbers of the levels that are these integers."""
        return (codes.astype(np.int16) + self._half).astype(np.uint8)

    @property
    def _half(self) -> int:
        return 1 << (self.bits - 1)


def fit(values: Float32, grid: Grid) -> tuple[Float32, Int8]:
    """Scales and zero points of [rows, columns]."""
    groups = grid.groups(values.shape[1])
    if grid.symmetric:
        scales = symmetric(group_absmax(values, groups), ((1 << grid.bits) - 1) / 2, grid.dtype)
        return scales, np.zeros(scales.shape, np.int8)
    low, high = np.empty((2, len(values), groups), np.float32)
    extremes(values, low, high)
    return asymmetric(low, high, grid.bits, grid.dtype)


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _encode(values: Float32, scales: Float32, zeros: Int8, bits: int, dropped: np.uint32, out: Int8) -> None:
    rows, groups = scales.shape
    size = values.shape[1] // max(groups, 1)
    first, last = np.float32(-(1 << (bits - 1))), np.float32((1 << (bits - 1)) - 1)
    for row in range(rows):
        for group in range(groups):
            part = values[row, group * size : (group + 1) * size]
            codes = out[row, group * size : (group + 1) * size]
            scale, zero = scales[row, group], np.float32(zeros[row, group])
            if zero == 0:  # nothing to add, nothing to round again: 1.4 times as fast
                for index in range(part.size):
                    place = round_normal(part[index] / scale, dropped)
                    codes[index] = to_int8(min(max(place, first), last))
                continue
            for index in range(part.size):
                place = round_normal(round_normal(part[index] / scale, dropped) + zero, dropped)
                codes[index] = to_int8(min(max(place, first), last))


def encode(values: Float32, scales: Float32, zeros: Int8, grid: Grid, out: Int8) -> None:
    """Codes of [rows, columns] into `out` of the same shape; scales and zero points are from `fit`, or others."""
    _encode(values, scales, zeros, grid.bits, DROPPED_BITS[grid.dtype], out)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def decode(codes: Int8, scales: Float32, zeros: Int8, out: Float32) -> None:
    """The values of codes [rows, columns] into float32 `out`; rounding them to the dtype gives the library's bytes.

    The product of 9 bits and the 11 of an fp16 scale, or the 8 of a bf16 one, is exact in float32.
    """
    rows, groups = scales.shape
    size = codes.shape[1] // max(groups, 1)
    for row in range(rows):
        for group in range(groups):
            part = codes[row, group * size : (group + 1) * size]
            values = out[row, group * size : (group + 1) * size]
            scale, zero = scales[row, group], np.int32(zeros[row, group])
            for index in range(part.size):
                values[index] = np.float32(np.int32(np.int32(part[index]) - zero)) * scale
