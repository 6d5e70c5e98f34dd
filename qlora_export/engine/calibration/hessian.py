"""What the inputs of a layer look like: second moments, under the rounded prefix and crossed with the trained model.

H = sum x x^T / n,   C = sum x_trained x^T / n   [columns, columns]
"""

from __future__ import annotations

import torch
from torch import Tensor


class InputStatistics:
    """Sums over batches of inputs [tokens, columns]."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._squares = torch.zeros(columns, columns, device=device)
        self._crossed = torch.zeros(columns, columns, device=device)
        self.tokens = 0

    def add(self, rounded: Tensor, trained: Tensor) -> None:
        """Add the inputs of one batch; those of other tokens than the rounded model's tell nothing across.

        Inputs that are equal add equal sums to both, to the last bit.
        """
        squares = rounded.T @ rounded
        undisturbed = trained.shape != rounded.shape or torch.equal(trained, rounded)
        self._squares += squares
        self._crossed += squares if undisturbed else trained.T @ rounded
        self.tokens += len(rounded)

    @property
    def hessian(self) -> Tensor:
        """H."""
        return self._squares / max(self.tokens, 1)

    @property
    def crossed(self) -> Tensor:
        """C."""
        return self._crossed / max(self.tokens, 1)
