"""What a layer should do, seen from inputs that are no longer those of the trained model.

    T' = T + a T (C - H) (H + l I)^-1,   C = E[x_trained x^T],  H = E[x x^T]

`x` are the inputs that the already rounded prefix gives, `x_trained` those of the trained model for the same tokens:
with a = 1 the layer's output would be the trained one as nearly as a matrix can make it; a < 1 trusts the statistics
less. Source: GPTAQ (arXiv 2504.02692).
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.05


def corrected_target(target: Tensor, hessian: Tensor, crossed: Tensor, strength: float) -> Tensor:
    """The target [rows, columns] for inputs of a rounded prefix; `crossed` is C [columns, columns]."""
    damping = DAMPING * hessian.diagonal().mean()
    damped = hessian.double() + torch.eye(len(hessian), dtype=torch.float64, device=hessian.device) * damping
    change = target.double() @ (crossed - hessian).double()
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return target
    return target + strength * torch.cholesky_solve(change.T, lower).T.float()


def retention(found: Tensor, delta: Tensor, hessian: Tensor) -> float:
    """How much of a delta [rows, columns] the found change keeps in the layer's output: <found H, d> / <d H, d>."""
    weighted = delta @ hessian
    whole = float((weighted * delta).sum(dtype=torch.float64))
    return float((found * weighted).sum(dtype=torch.float64)) / whole if whole > 0 else 1.0
