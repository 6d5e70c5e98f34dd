"""Least squares for all scales of a row together, with the codes as they are.

    minimise over s   |sum_g s_g c_g - T|_H^2:   M s = b,   M_gh = c_g H c_h^T,   b_g = c_g H T^T

`c_g` are the levels of group g, zero elsewhere. Rows that share their scales have one system, the sum of theirs. A
block takes its new scales, as they can be stored, where the objective falls; no scale turns negative but on a grid with
signs. Cost: rows * columns^2 operations and a system of [groups, groups] for each block, some blocks at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_export.quant.rounding.coordinate_descent import row_objective
from qlora_export.quant.rounding.grid import Grid

RIDGE = 1e-4
# The systems of so many blocks are solved at once that their matrices have about so many values together.
PIECE_VALUES = 1 << 26


def fit_scales(target: Tensor, hessian: Tensor, grid: Grid, scales: Tensor, codes: Tensor) -> Tensor:
    """Scales [blocks, groups] that can be stored, for codes [rows, columns]."""
    count = max(1, PIECE_VALUES // scales.shape[1] ** 2)
    solved = []
    for first in range(0, len(scales), count):
        rows = slice(first * grid.height, (first + count) * grid.height)
        solved.append(_solve(target[rows], hessian, grid, scales[first : first + count], codes[rows]))
    wanted = torch.cat(solved)
    if not grid.signed:
        wanted = torch.where(wanted > 0, wanted, scales)
    fitted = grid.rule(wanted)
    before = grid.of_blocks(row_objective(target, hessian, grid.decode(codes, scales)))
    after = grid.of_blocks(row_objective(target, hessian, grid.decode(codes, fitted)))
    return torch.where((after < before)[:, None], fitted, scales)


def _solve(target: Tensor, hessian: Tensor, grid: Grid, scales: Tensor, codes: Tensor) -> Tensor:
    blocks, groups = scales.shape
    levels = grid.level_tensor(target)[codes]
    matrix = torch.empty(blocks, groups, groups, device=target.device)
    right = torch.empty(blocks, groups, device=target.device)
    for group in range(groups):
        place = slice(group * grid.group, (group + 1) * grid.group)
        product = levels[:, place] @ hessian[place]
        matrix[:, group] = grid.of_blocks((product * levels).reshape(-1, groups, grid.group).sum(dim=2))
        right[:, group] = grid.of_blocks((product * target).sum(dim=1))
    ridge = RIDGE * matrix.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-30)
    matrix.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    right += ridge[:, None] * scales
    solved, failed = torch.linalg.solve_ex(matrix, right)
    return torch.where((failed == 0)[:, None] & solved.isfinite().all(dim=1, keepdim=True), solved, scales)
