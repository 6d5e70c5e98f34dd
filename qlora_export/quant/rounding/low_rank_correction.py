"""A product of two thin factors that makes up for as much of a rounding error as its rank allows.

    minimise over B, A of rank r   tr((E - B A) H (E - B A)^T),   E = T - Q

The optimum is U U^T E with U the r leading left singular vectors of E R^(1/2), R = H + RIDGE tr(H)/K I: a projection,
so no rank makes the objective larger. U comes from whichever is smaller of E R E^T [rows, rows] and L^T E^T E L
[columns, columns] with R = L L^T. Sources: LQER (arXiv 2402.02446), QERA (arXiv 2410.06040). Cost: two products of
rows * columns^2 and one decomposition of the smaller side, in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qlora_export.quant.rounding.coordinate_descent import row_objective

RIDGE = 1e-4


def low_rank_correction(
    error: Tensor, hessian: Tensor, rank: int, stored: Callable[[Tensor], Tensor] = lambda factor: factor
) -> tuple[Tensor, Tensor]:
    """B [rows, rank] and A [rank, columns] as they can be stored, for an error [rows, columns] in float32.

    Components beyond the smaller side are zero; all are where the factors, rounded by `stored`, do not help.
    """
    b, a = _optimum(error, hessian, min(rank, *error.shape))
    scale = a.norm(dim=1).clamp_min(1e-30).sqrt()
    b, a = stored((b * scale).float()), stored((a / scale[:, None]).float())
    missing = rank - b.shape[1]
    b, a = torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing))
    before = row_objective(torch.zeros_like(error), hessian, error).sum(dtype=torch.float64)
    after = row_objective(error, hessian, b @ a).sum(dtype=torch.float64)
    return (b, a) if after < before else (torch.zeros_like(b), torch.zeros_like(a))


def _optimum(error: Tensor, hessian: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U and U^T E, in float64."""
    rows, columns = error.shape
    wide, weights = error.double(), hessian.double()
    weights = weights + torch.eye(columns, dtype=torch.float64, device=error.device) * RIDGE * weights.diagonal().mean()
    if rows <= columns:
        left = _leading(wide @ weights @ wide.T, rank)
    else:
        product = wide @ _root(weights)
        left = torch.linalg.qr(product @ _leading(product.T @ product, rank)).Q
    return left, left.T @ wide


def _leading(symmetric: Tensor, count: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, in falling order."""
    return torch.linalg.eigh(symmetric).eigenvectors.flip(1)[:, :count]


def _root(weights: Tensor) -> Tensor:
    """L with L L^T; of weights that are not positive by rounding, from their eigenvalues."""
    lower, failed = torch.linalg.cholesky_ex(weights)
    if not failed:
        return lower
    values, vectors = torch.linalg.eigh(weights)
    return vectors * values.clamp_min(0).sqrt()
