"""Sweeps of coordinate descent over codes: each weight moves to the level that is best while all others stay.

    q_j <- nearest(q_j - [(Q - T) H]_j / H_jj)

The objective tr (Q - T) H (Q - T)^T never rises: along one coordinate it is a parabola, whose best level is the nearest
to its lowest point. Cost: rows * columns^2 operations a sweep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_export.quant.rounding.grid import Grid, nonzero

PIECE_COLUMNS = 128


def sweep(target: Tensor, hessian: Tensor, grid: Grid, scales: Tensor, codes: Tensor) -> Tensor:
    """The codes [rows, columns] after each column had its turn; scales [blocks, groups] can be stored."""
    levels, midpoints = grid.level_tensor(target), grid.midpoints(target)
    spread = grid.spread(scales, len(target)).T.contiguous()
    divisors = nonzero(spread)
    codes = codes.T.clone(memory_format=torch.contiguous_format)
    values = levels[codes] * spread
    gradient = hessian @ (values - target.T)
    for first in range(0, len(codes), PIECE_COLUMNS):
        last = min(first + PIECE_COLUMNS, len(codes))
        moves = torch.zeros_like(values[first:last])
        for column in range(first, last):
            curvature = hessian[column, column]
            if curvature <= 0:
                continue
            lowest = values[column] - gradient[column] / curvature
            codes[column] = torch.bucketize(lowest / divisors[column], midpoints)
            moved = levels[codes[column]] * spread[column] - values[column]
            gradient[column:last] += hessian[column:last, column, None] * moved
            moves[column - first] = moved
        gradient[last:] += hessian[last:, first:last] @ moves
        values[first:last] += moves
    return codes.T.contiguous()


def row_objective(target: Tensor, hessian: Tensor, values: Tensor) -> Tensor:
    """(Q - T) H (Q - T)^T of every row: [rows]."""
    difference = values - target
    return ((difference @ hessian) * difference).sum(dim=1)
