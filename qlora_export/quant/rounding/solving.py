"""One weight on a grid, by everything that calibration tells of its inputs.

    target T' = merged weight, corrected for inputs of the rounded prefix, plus (g - 1) delta
    scales by weighted search, codes by error feedback, sweeps, scales by least squares, one more sweep

Error feedback on the grid that the base lies on shrinks a small delta towards the base. `g` makes up for it: it rises
until <(Q - T) H, delta> / <delta H, delta> is within `SHRINKAGE_LIMIT` of 0, three rounds at most. Every choice keeps
what was there where it is no worse, so a delta of zero with undisturbed inputs gives the base's own codes and scales.
Cost: the inverse, and about six products of rows * columns^2 a round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_export.quant.rounding.coordinate_descent import row_objective, sweep
from qlora_export.quant.rounding.gptq import Inverse, feed_back, invert
from qlora_export.quant.rounding.grid import Grid
from qlora_export.quant.rounding.scale_fit import fit_scales
from qlora_export.quant.rounding.scale_search import group_errors, search_scales
from qlora_export.quant.rounding.target import corrected_target, retention

SHRINKAGE_LIMIT = 0.02
LARGEST_GAIN = 3.0


@dataclass(frozen=True)
class Method:
    """Which steps are taken: strength of the correction (0 to 1), sweeps, least squares, rounds for the delta."""

    correction: float = 1.0
    sweeps: int = 2
    fits_scales: bool = True
    rounds: int = 3


@dataclass(frozen=True)
class Layer:
    """A weight to round: `base` and `delta` [rows, columns], and H and C of its inputs [columns, columns]."""

    base: Tensor
    delta: Tensor
    hessian: Tensor
    crossed: Tensor

    @property
    def merged(self) -> Tensor:
        """What the trained model multiplies with."""
        return self.base + self.delta


@dataclass(frozen=True)
class Solution:
    """Codes [rows, columns] on a grid with scales [blocks, groups], the gain g, the damping, and how far it is off."""

    grid: Grid
    codes: Tensor
    scales: Tensor
    gain: float
    shrinkage: float
    damping: float

    @property
    def values(self) -> Tensor:
        """The weights [rows, columns]."""
        return self.grid.decode(self.codes, self.scales)


# A grid that is known before the scales are, with scales that it holds already, or what makes one from scales.
Start = tuple[Grid, Tensor | None] | Callable[[Tensor], Grid]


def solve(layer: Layer, free: Grid, starts: Sequence[Start], method: Method) -> Solution | None:
    """Round a layer; None where its Hessian is singular. `free` is the grid with any scale, the starts what is stored.

    Of several starts the one whose scales leave the least weighted error is taken.
    """
    inverse = invert(layer.hessian)
    if inverse is None:
        return None
    target = target_of(layer, method)
    gain, best = 1.0, None
    for _ in range(max(1, method.rounds)):
        found = _round(layer, target, gain, inverse, free, starts, method)
        if best is None or abs(found.shrinkage) < abs(best.shrinkage):
            best = found
        if abs(found.shrinkage) < SHRINKAGE_LIMIT:
            break
        gain = min(max(gain - found.shrinkage, 1 / LARGEST_GAIN), LARGEST_GAIN)
    return best


def target_of(layer: Layer, method: Method) -> Tensor:
    """The merged weight [rows, columns], corrected for the inputs of the rounded prefix."""
    if not method.correction:
        return layer.merged
    return corrected_target(layer.merged, layer.hessian, layer.crossed, method.correction)


def _round(
    layer: Layer,
    target: Tensor,
    gain: float,
    inverse: Inverse,
    free: Grid,
    starts: Sequence[Start],
    method: Method,
) -> Solution:
    wanted = target + (gain - 1) * layer.delta
    grid, scales = _start(wanted, layer.hessian.diagonal(), free, starts)
    nearest = grid.nearest(wanted, scales)
    codes = _better(wanted, layer.hessian, grid, scales, nearest, feed_back(wanted, inverse, grid, scales))
    for _ in range(method.sweeps):
        codes = sweep(wanted, layer.hessian, grid, scales, codes)
    if method.fits_scales:
        scales = fit_scales(wanted, layer.hessian, grid, scales, codes)
        if method.sweeps:
            codes = sweep(wanted, layer.hessian, grid, scales, codes)
    missed = grid.decode(codes, scales) - target
    shrinkage = retention(missed, layer.delta, layer.hessian) if layer.delta.any() else 0.0
    return Solution(grid, codes, scales, gain, shrinkage, inverse.damping)


def _better(wanted: Tensor, hessian: Tensor, grid: Grid, scales: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Row by row the codes of the lower objective, the first where they are equal."""
    before = row_objective(wanted, hessian, grid.decode(first, scales))
    after = row_objective(wanted, hessian, grid.decode(second, scales))
    return torch.where((after < before)[:, None], second, first)


def _start(wanted: Tensor, weights: Tensor, free: Grid, starts: Sequence[Start]) -> tuple[Grid, Tensor]:
    """The grid and the scales, as stored, of the start with the least weighted error; the first wins ties."""
    found = []
    fresh: Tensor | None = None
    for start in starts:
        if isinstance(start, tuple):
            grid, known = start
            scales = grid.rule(search_scales(wanted, weights, grid, known))
        else:
            fresh = search_scales(wanted, weights, free) if fresh is None else fresh
            grid = start(fresh)
            scales = grid.rule(fresh)
        found.append((float(group_errors(wanted, weights, grid, scales).sum(dtype=torch.float64)), grid, scales))
    _, grid, scales = min(found, key=lambda item: item[0])
    return grid, scales
