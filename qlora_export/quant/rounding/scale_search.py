"""The scale of each group that keeps the weighted squared error small.

    minimise over s   sum_i w_i (T_i - s * nearest(T_i / s))^2,   w_i = E[x_i^2], or 1 without calibration

over the columns of a group, in all rows that share the scale.

Candidates are fractions of the absmax scale, of both signs where the grid allows it; the best is refined by least
squares, `s = sum w T c / sum w c^2` with `c` the levels chosen. What can be stored of a scale is taken into account.
Cost: some 45 passes over the weights, 90 with signs. Source: imatrix and MSE observers as in llm-compressor; signed
scales as in AutoRound's `full_range_sym`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_export.quant.rounding.grid import Grid, nonzero

FRACTIONS = tuple(0.70 + 0.01 * step for step in range(43))
REFITS = 2
# Rows are searched in pieces of about so many weights.
PIECE_WEIGHTS = 1 << 21


def search_scales(target: Tensor, weights: Tensor, grid: Grid, known: Tensor | None = None) -> Tensor:
    """Scales [blocks, groups], before the grid's rule, for a target [rows, columns] and weights [columns].

    `known` scales [blocks, groups] are candidates, too, and win ties.
    """
    count, groups = -(-target.shape[0] // grid.height), target.shape[1] // grid.group
    step = max(1, PIECE_WEIGHTS // (target.shape[1] * grid.height))
    found = []
    for first in range(0, count, step):
        rows = target[first * grid.height : (first + step) * grid.height]
        start = None if known is None else known[first : first + step]
        found.append(_search(rows, weights, grid.rows_from(first * groups), start))
    return torch.cat(found)


def absmax_scales(target: Tensor, grid: Grid) -> Tensor:
    """The scales [blocks, groups] with which the largest magnitude of each group meets the largest level."""
    return grid.largest_of_blocks(_groups(target, grid).abs().amax(dim=2)) / grid.reach


def group_errors(target: Tensor, weights: Tensor, grid: Grid, scales: Tensor) -> Tensor:
    """Weighted squared error [blocks, groups] of the nearest codes."""
    difference = target - grid.decode(grid.nearest(target, scales), scales)
    return _summed(difference.square() * weights, grid)


def _search(target: Tensor, weights: Tensor, grid: Grid, known: Tensor | None) -> Tensor:
    largest = absmax_scales(target, grid)
    best = largest if known is None else known
    least = group_errors(target, weights, grid, grid.rule(best))
    signs = (1.0, -1.0) if grid.signed else (1.0,)
    for fraction in FRACTIONS:
        for sign in signs:
            best, least = _better(target, weights, grid, largest * (sign * fraction), best, least)
    for _ in range(REFITS):
        best, least = _better(target, weights, grid, _refit(target, weights, grid, best), best, least)
    return best


def _better(
    target: Tensor, weights: Tensor, grid: Grid, scales: Tensor, best: Tensor, least: Tensor
) -> tuple[Tensor, Tensor]:
    errors = group_errors(target, weights, grid, grid.rule(scales))
    better = errors < least
    return torch.where(better, scales, best), torch.where(better, errors, least)


def _refit(target: Tensor, weights: Tensor, grid: Grid, scales: Tensor) -> Tensor:
    levels = grid.level_tensor(target)[grid.nearest(target, scales)]
    above = _summed(levels * target * weights, grid)
    below = _summed(levels.square() * weights, grid)
    return torch.where(below > 0, above / nonzero(below), scales)


def _summed(values: Tensor, grid: Grid) -> Tensor:
    """Over the weights that share a scale: [rows, columns] to [blocks, groups]."""
    return grid.of_blocks(_groups(values, grid).sum(dim=2))


def _groups(values: Tensor, grid: Grid) -> Tensor:
    return values.reshape(values.shape[0], -1, grid.group)
