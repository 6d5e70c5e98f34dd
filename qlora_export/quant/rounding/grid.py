"""The values that a format can hold: levels, and a scale for each group of columns.

    Q[r, c] = levels[codes[r, c]] * scales[r // height, c // group]

What a layout can store of a scale is its scale rule: float32 as it is, a 16-bit float, e4m3 below a global scale, a
power of two, or a code of double quantisation. A rule is applied to each scale by itself, so that scales can be refined
one by one; what it gives may depend on the scale's place in the weight, so some rows of a weight have a grid of their
own. `height` rows make a block, which has one scale a group; the last block may be short.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qlora_export.quant import double_quant, float4, float8

# What a layout can store, elementwise: scales [blocks, groups] to scales [blocks, groups].
ScaleRule = Callable[[Tensor], Tensor]
SMALLEST_SCALE = 1e-30


@dataclass(frozen=True)
class Grid:
    """Ascending `levels`, columns in a `group`, and the scales that can be stored; `signed` ones may be negative.

    `height` rows share their scales.
    """

    levels: tuple[float, ...]
    group: int
    rule: ScaleRule
    signed: bool = False
    height: int = 1

    def rows_from(self, first_scale: int) -> Grid:
        """The grid of the rows that begin with this scale of the weight."""
        if not isinstance(self.rule, DoubleQuantScales):
            return self
        return replace(self, rule=replace(self.rule, first=self.rule.first + first_scale))

    @property
    def reach(self) -> float:
        """The largest magnitude of a level."""
        return max(abs(self.levels[0]), abs(self.levels[-1]))

    def level_tensor(self, like: Tensor) -> Tensor:
        """The levels where another tensor is."""
        return torch.tensor(self.levels, dtype=torch.float32, device=like.device)

    def midpoints(self, like: Tensor) -> Tensor:
        """What lies halfway between two levels; values above one belong to the upper level."""
        levels = self.level_tensor(like)
        return (levels[:-1] + levels[1:]) / 2

    def spread(self, scales: Tensor, rows: int) -> Tensor:
        """Scales [blocks, groups] as one for each weight: [rows, columns]."""
        wide = scales.repeat_interleave(self.group, dim=1)
        return wide if self.height == 1 else wide.repeat_interleave(self.height, dim=0)[:rows]

    def of_blocks(self, by_rows: Tensor) -> Tensor:
        """Sums over the rows of every block: [rows, ...] to [blocks, ...]."""
        return by_rows if self.height == 1 else _in_blocks(by_rows, self.height).sum(dim=1)

    def largest_of_blocks(self, by_rows: Tensor) -> Tensor:
        """The largest of the rows of every block, none of which is negative: [rows, groups] to [blocks, groups]."""
        return by_rows if self.height == 1 else _in_blocks(by_rows, self.height).amax(dim=1)

    def nearest(self, values: Tensor, scales: Tensor) -> Tensor:
        """Codes [rows, columns] (int64) of the levels nearest to values [rows, columns]."""
        return torch.bucketize(values / nonzero(self.spread(scales, len(values))), self.midpoints(values))

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The values [rows, columns] of codes and scales."""
        return self.level_tensor(scales)[codes] * self.spread(scales, len(codes))


@dataclass(frozen=True)
class DoubleQuantScales:
    """The scales of double quantisation with its second level fixed: `offset + MAP[code] * nested_absmax`.

    `nested_absmax` has one value for each 256 scales in row-major order. Calling it rounds scales to the nearest that
    there is; they begin with scale number `first` of the weight.
    """

    offset: float
    nested_absmax: Tensor
    first: int = 0

    def __call__(self, scales: Tensor) -> Tensor:
        """Scales [rows, groups] that can be stored."""
        return _map(scales)[self._numbers(scales)].mul(self._spread(scales)).add(self.offset)

    def _numbers(self, scales: Tensor) -> Tensor:
        spread = self._spread(scales)
        scaled = torch.where(spread > 0, (scales - self.offset) / nonzero(spread), torch.zeros_like(scales))
        levels = _map(scales)
        return torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2)

    def _spread(self, scales: Tensor) -> Tensor:
        places = torch.arange(self.first, self.first + scales.numel(), device=scales.device) // double_quant.BLOCK
        return self.nested_absmax.to(scales.device)[places].reshape(scales.shape)


def fitted_double_quant_scales(scales: Tensor) -> DoubleQuantScales:
    """The second level that fresh double quantisation of these scales [rows, groups] has."""
    absmax = scales.detach().float().cpu().numpy().reshape(-1)
    offset = double_quant.mean(absmax)
    _, nested_absmax = double_quant.encode(absmax, offset)
    return DoubleQuantScales(float(offset), torch.from_numpy(nested_absmax))


def sixteen_bit_scales(dtype: torch.dtype) -> ScaleRule:
    """Scales in a 16-bit float."""
    return lambda scales: scales.to(dtype).float()


def e4m3_scales(global_scale: float) -> ScaleRule:
    """NVFP4's scales, e4m3 divided by a power of two; a zero becomes what rounding to nearest has in its place."""
    zero = float(float8.widen_e4m3(np.array([float4.ZERO_SCALE]))[0])

    def rule(scales: Tensor) -> Tensor:
        held = (scales * global_scale).clamp(0, float8.LARGEST).to(torch.float8_e4m3fn).float()
        return torch.where(held > 0, held, zero) / global_scale

    return rule


def power_of_two_scales(scales: Tensor) -> Tensor:
    """MXFP4's scales: powers of two from 2^-127 on, of a sixth of an absmax the one that rounding to nearest has."""
    mantissa, exponent = torch.frexp(scales.clamp_min(2.0**-127).double())
    power = exponent - (mantissa < float(float4.NEXT_POWER)).int()
    return torch.ldexp(torch.ones_like(mantissa), power.clamp(-127, 127)).float()


def nonzero(scales: Tensor) -> Tensor:
    """The scales, with the smallest magnitude in place of zeros."""
    return torch.where(scales.abs() < SMALLEST_SCALE, torch.full_like(scales, SMALLEST_SCALE), scales)


def _in_blocks(by_rows: Tensor, height: int) -> Tensor:
    """[rows, ...] as [blocks, height, ...], with zeros for the rows that the last block lacks."""
    missing = -len(by_rows) % height
    if missing:
        by_rows = torch.cat([by_rows, by_rows.new_zeros((missing, *by_rows.shape[1:]))])
    return by_rows.reshape(-1, height, *by_rows.shape[1:])


def _map(like: Tensor) -> Tensor:
    return torch.from_numpy(double_quant.dynamic_map()).to(like.device)
