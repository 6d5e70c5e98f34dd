"""Kernels for rows wherever they are: numpy arrays go to `quant/`, torch tensors to `torch_kernels`.

Rows are flat float32, or bf16 as it is stored: uint16 in numpy, bfloat16 in torch. What is small (absmax, scales,
factors) stays in host memory, and so does everything that is going to be written. torch is imported for tensors alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qlora_export.quant import floats, four_bit, low_rank
from qlora_export.quant.floats import Float32, UInt8

# A numpy array of float32 or uint16, or a torch tensor of float32 or bfloat16.
Values = Any


def on_device(values: Values) -> bool:
    """Whether these are a tensor."""
    return not isinstance(values, np.ndarray)


def widen(values: Values) -> Values:
    """bf16 as float32, in a new array."""
    if on_device(values):
        return _torch().widen(values)
    out = np.empty(values.size, np.float32)
    floats.widen_bfloat16(values, out.view(np.uint32))
    return out


def all_finite(values: Values) -> bool:
    """Whether there is neither NaN nor infinity among float32 values."""
    return bool(_torch().all_finite(values) if on_device(values) else floats.all_finite(values.view(np.uint32)))


def to_host(values: Values) -> Float32:
    """As a numpy array."""
    host: Float32 = _torch().to_host(values) if on_device(values) else values
    return host


def copy(values: Values) -> Values:
    """A copy where they are."""
    return values.clone() if on_device(values) else values.copy()


def block_absmax(values: Values, block: int, out: Float32) -> None:
    """See `quant.four_bit.block_absmax`."""
    (_torch() if on_device(values) else four_bit).block_absmax(values, block, out)


def encode_four_bit(values: Values, absmax: Float32, block: int, grid: four_bit.FourBitGrid) -> UInt8:
    """The packed codes, ceil(size / 2) bytes."""
    out: UInt8 = np.empty((len(values) + 1) // 2, np.uint8)
    (_torch() if on_device(values) else four_bit).encode(values, absmax, block, grid, out)
    return out


def round_trip(values: Values, absmax: Float32, scales: Float32, block: int, grid: four_bit.FourBitGrid) -> Values:
    """The float32 values that the codes of these would decode to, in a new array."""
    if on_device(values):
        return _torch().round_trip(values, absmax, scales, block, grid)
    out = np.empty(values.size, np.float32)
    four_bit.round_trip(values, absmax, scales, block, grid, out)
    return out


def add_low_rank(values: Values, right: Float32, left: Float32, scale: np.float32) -> None:
    """Add `scale * left @ right` to [rows, columns] in place: left [rows, rank], right [rank, columns]."""
    (_torch() if on_device(values) else low_rank).add_low_rank(values, right, left, scale)


def round_to(values: Values, dtype: str) -> Values:
    """A tensor rounded to a 16-bit dtype, still as float32."""
    return _torch().round_to(values, dtype)


def narrow(values: Values, dtype: str) -> UInt8:
    """Raw bytes of a tensor in a dtype, in host memory."""
    raw: UInt8 = _torch().narrow(values, dtype)
    return raw


def _torch() -> Any:
    from qlora_export.quant.device import torch_kernels

    return torch_kernels
