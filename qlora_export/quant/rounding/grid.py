"""The values that a format can hold: levels, and a scale for each group of columns.

    Q[r, c] = levels[codes[r, c]] * scales[r, c // group]

What a layout can store of a scale is its scale rule: float32 as it is, a 16-bit float, or a code of double
quantisation. A rule is applied to each scale by itself, so that scales can be refined one by one; what it gives may
depend on the scale's place in the weight, so some rows of a weight have a grid of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_export.quant import nested

# What a layout can store, elementwise: scales [rows, groups] to scales [rows, groups].
ScaleRule = Callable[[Tensor], Tensor]
SMALLEST_SCALE = 1e-30


@dataclass(frozen=True)
class Grid:
    """Ascending `levels`, columns in a `group`, and the scales that can be stored; `signed` ones may be negative."""

    levels: tuple[float, ...]
    group: int
    rule: ScaleRule
    signed: bool = False

    def rows_from(self, first_scale: int) -> Grid:
        """The grid of the rows that begin with this scale of the weight."""
        if not isinstance(self.rule, NestedScales):
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

    def spread(self, scales: Tensor) -> Tensor:
        """Scales [rows, groups] as one for each column: [rows, columns]."""
        return scales.repeat_interleave(self.group, dim=1)

    def nearest(self, values: Tensor, scales: Tensor) -> Tensor:
        """Codes [rows, columns] (int64) of the levels nearest to values [rows, columns]."""
        return torch.bucketize(values / nonzero(self.spread(scales)), self.midpoints(values))

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The values [rows, columns] of codes and scales."""
        return self.level_tensor(scales)[codes] * self.spread(scales)


@dataclass(frozen=True)
class NestedScales:
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
        places = torch.arange(self.first, self.first + scales.numel(), device=scales.device) // nested.BLOCK
        return self.nested_absmax.to(scales.device)[places].reshape(scales.shape)


def fitted_nested_scales(scales: Tensor) -> NestedScales:
    """The second level that fresh double quantisation of these scales [rows, groups] has."""
    absmax = scales.detach().float().cpu().numpy().reshape(-1)
    offset = nested.mean(absmax)
    _, nested_absmax = nested.encode(absmax, offset)
    return NestedScales(float(offset), torch.from_numpy(nested_absmax))


def sixteen_bit_scales(dtype: torch.dtype) -> ScaleRule:
    """Scales in a 16-bit float."""
    return lambda scales: scales.to(dtype).float()


def nonzero(scales: Tensor) -> Tensor:
    """The scales, with the smallest magnitude in place of zeros."""
    return torch.where(scales.abs() < SMALLEST_SCALE, torch.full_like(scales, SMALLEST_SCALE), scales)


def _map(like: Tensor) -> Tensor:
    return torch.from_numpy(nested.dynamic_map()).to(like.device)
