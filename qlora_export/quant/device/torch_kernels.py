"""The kernels on torch tensors, on any device, byte for byte as numba's on a CPU.

Elementwise operations of IEEE floats give the same bits everywhere as long as each is rounded on its own: products and
sums are separate kernels, never fused multiply-adds, and a low-rank sum runs over its components in order. The CUDA
kernels of bitsandbytes are not used: they divide fast, and might choose another code than a CPU next to a midpoint.
Values come as float32, or as bf16, which is widened. Cost: about 16 bytes of the device's memory a weight and
component.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qlora_export.quant.floats import Float32, UInt8
from qlora_export.quant.four_bit import SMALLEST, FourBitGrid

NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}


def widen(values: torch.Tensor) -> torch.Tensor:
    """As float32."""
    return values.to(torch.float32)


def all_finite(values: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity."""
    return bool(torch.isfinite(values).all())


def to_host(values: torch.Tensor) -> Float32:
    """As a numpy array."""
    host: Float32 = values.cpu().numpy()
    return host


def block_absmax(values: torch.Tensor, block: int, out: Float32) -> None:
    """Largest magnitude of every block into host memory; the last block may be short."""
    magnitudes = widen(values).abs()
    whole = len(values) // block * block
    if whole:
        out[: whole // block] = to_host(magnitudes[:whole].view(-1, block).amax(1))
    if whole < len(values):
        out[-1] = max(np.float32(magnitudes[whole:].max().item()), SMALLEST)


def encode(values: torch.Tensor, absmax: Float32, block: int, grid: FourBitGrid, out: UInt8) -> None:
    """Pack the nearest codes into host memory."""
    numbers = _numbers(values, absmax, block, grid)
    if len(numbers) % 2:
        zero = torch.bucketize(torch.zeros(1, device=values.device), _there(grid.midpoints, values), out_int32=True)
        numbers = torch.cat([numbers, zero.to(torch.uint8)])
    packed = (numbers[::2] << 4) | numbers[1::2]
    if grid.renumber is not None:
        packed = _there(grid.renumber, values)[packed.to(torch.int32)]
    out[:] = packed.cpu().numpy()


def round_trip(values: torch.Tensor, absmax: Float32, scales: Float32, block: int, grid: FourBitGrid) -> torch.Tensor:
    """Encode and decode, as float32."""
    numbers = _numbers(values, absmax, block, grid)
    levels = _there(grid.levels, values)[numbers.to(torch.int32)]
    return levels * _spread(scales, block, values)


def round_to(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Rounded to a 16-bit dtype, still as float32."""
    return values.to(NARROW[dtype]).to(torch.float32) if dtype in NARROW else values


def narrow(values: torch.Tensor, dtype: str) -> UInt8:
    """Raw bytes of a dtype in host memory."""
    rounded = values.to(NARROW[dtype]) if dtype in NARROW else values
    raw: UInt8 = rounded.contiguous().view(torch.uint8).cpu().numpy()
    return raw


def add_low_rank(values: torch.Tensor, right: Float32, left: Float32, scale: np.float32) -> None:
    """Add `scale * left @ right` to [rows, columns] in place, component after component."""
    right_there, left_there = _there(right, values), _there(left, values)
    sums = torch.zeros_like(values)
    for component in range(right.shape[0]):
        sums += left_there[:, component : component + 1] * right_there[component]
    values += sums * float(scale)


def _numbers(values: torch.Tensor, absmax: Float32, block: int, grid: FourBitGrid) -> torch.Tensor:
    """The numbers of the levels in ascending order, uint8."""
    whole = len(values) // block
    divisors = np.maximum(absmax, SMALLEST)
    scaled = widen(values)
    reciprocals = _spread((np.float32(1) / divisors[:whole]).astype(np.float32), block, scaled[: whole * block])
    parts = [scaled[: whole * block] * reciprocals]
    if whole * block < len(values):
        parts.append(scaled[whole * block :] / _there(absmax[-1:], values))
    return torch.bucketize(torch.cat(parts), _there(grid.midpoints, values), out_int32=True).to(torch.uint8)


def _spread(per_block: Float32, block: int, values: torch.Tensor) -> torch.Tensor:
    """A number of each block for every value of it."""
    return _there(per_block, values).repeat_interleave(block)[: len(values)]


def _there(array: Any, values: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(values.device)
