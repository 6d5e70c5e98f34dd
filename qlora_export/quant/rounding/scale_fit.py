"""Least squares for all scales of a row together, with the codes as they are.

    minimise over s   |sum_g s_g c_g - T|_H^2:   M s = b,   M_gh = c_g H c_h^T,   b_g = c_g H T^T

`c_g` are the levels of group g, zero elsewhere. A row takes its new scales, as they can be stored, where the objective
falls. Cost: rows * columns^2 operations and a system of [groups, groups] for each row, some rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_export.quant.rounding.coordinate_descent import row_objective
from qlora_export.quant.rounding.grid import Grid

RIDGE = 1e-4
# The systems of so many rows are solved at once that their matrices have about so many values together.
PIECE_VALUES = 1 << 26


def fit_scales(target: Tensor, hessian: Tensor, grid: Grid, scales: Tensor, codes: Tensor) -> Tensor:
    """Scales [rows, groups] that can be stored, for codes [rows, columns]."""
    height = max(1, PIECE_VALUES // scales.shape[1] ** 2)
    pieces = [slice(first, first + height) for first in range(0, len(scales), height)]
    solved = [_solve(target[piece], hessian, grid, scales[piece], codes[piece]) for piece in pieces]
    fitted = grid.rule(torch.cat(solved))
    before = row_objective(target, hessian, grid.decode(codes, scales))
    after = row_objective(target, hessian, grid.decode(codes, fitted))
    return torch.where((after < before)[:, None], fitted, scales)


def _solve(target: Tensor, hessian: Tensor, grid: Grid, scales: Tensor, codes: Tensor) -> Tensor:
    rows, groups = scales.shape
    levels = grid.level_tensor(target)[codes]
    matrix = torch.empty(rows, groups, groups, device=target.device)
    right = torch.empty(rows, groups, device=target.device)
    for group in range(groups):
        place = slice(group * grid.group, (group + 1) * grid.group)
        product = levels[:, place] @ hessian[place]
        matrix[:, group] = (product * levels).reshape(rows, groups, grid.group).sum(dim=2)
        right[:, group] = (product * target).sum(dim=1)
    ridge = RIDGE * matrix.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-30)
    matrix.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    right += ridge[:, None] * scales
    solved, failed = torch.linalg.solve_ex(matrix, right)
    return torch.where((failed == 0)[:, None] & solved.isfinite().all(dim=1, keepdim=True), solved, scales)
