"""Values of weights, and how far they may be from each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def half_step(values: torch.Tensor) -> torch.Tensor:
    """Half the distance of bf16 values around each float32 value, and a little for float32 sums in another order."""
    return values.abs().clamp(min=1e-30).log2().floor().exp2() * 2**-8 + 1e-6 * values.abs().max()


def random_values(*shape: int, seed: int = 0, scale: float = 0.02) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Heavy-tailed float32 values, as weights are."""
    return (np.random.default_rng(seed).standard_t(4, shape) * scale).astype(np.float32)
