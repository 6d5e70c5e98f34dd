"""Error feedback: each column is rounded in turn, and its error is made up for by the columns not yet rounded.

    H^-1 = U^T U (U upper triangular),  e_j = (w_j - q_j) / U_jj,  w_k -= e_j U_jk  for k > j

Columns go in order of falling H_jj, the scales stay those of their groups. Source: GPTQ (arXiv 2210.17323), with static
groups. Cost: rows * columns^2 operations, most of them matrix products of pieces, after columns^3 for the inverse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_export.quant.rounding.grid import Grid, nonzero

PIECE_COLUMNS = 128
# Damping in parts of the mean of the diagonal, tried in turn until the Hessian can be inverted.
DAMPINGS = (0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Inverse:
    """The upper Cholesky factor of the damped inverse, columns in the `order` they are rounded in."""

    upper: Tensor
    order: Tensor
    damping: float


def invert(hessian: Tensor) -> Inverse | None:
    """What error feedback needs of a Hessian [columns, columns]; None when it is singular however much it is damped."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    ordered = hessian[order][:, order].double()
    mean = ordered.diagonal().mean()
    if not (torch.isfinite(mean) and mean > 0):
        return None
    for damping in DAMPINGS:
        damped = ordered + torch.eye(len(ordered), dtype=torch.float64, device=hessian.device) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return Inverse(upper.float(), order, damping)
    return None


def feed_back(target: Tensor, inverse: Inverse, grid: Grid, scales: Tensor) -> Tensor:
    """Codes [rows, columns] (int64) for a target [rows, columns] and scales [blocks, groups] that can be stored."""
    columns = target.shape[1]
    left = target[:, inverse.order].T.contiguous()
    spread = nonzero(grid.spread(scales, len(target)))[:, inverse.order].T.contiguous()
    levels, midpoints = grid.level_tensor(target), grid.midpoints(target)
    codes = torch.empty(left.shape, dtype=torch.int64, device=target.device)
    for first in range(0, columns, PIECE_COLUMNS):
        last = min(first + PIECE_COLUMNS, columns)
        errors = torch.empty_like(left[first:last])
        for column in range(first, last):
            codes[column] = torch.bucketize(left[column] / spread[column], midpoints)
            missed = left[column] - levels[codes[column]] * spread[column]
            error = missed / inverse.upper[column, column]
            left[column:last] -= inverse.upper[column, column:last, None] * error
            errors[column - first] = error
        left[last:] -= inverse.upper[first:last, last:].T @ errors
    ordered = torch.empty_like(codes)
    ordered[inverse.order] = codes
    return ordered.T.contiguous()
