"""How far a layer of one model is from the same layer of another that gets the same inputs.

    error = mean over tokens of |y_c - y_r| / max(|a_r|, median |a_r|)      a: what the layer adds, or its outputs y
    gain  = <a_c, a_r> / <a_r, a_r>                                         each without its mean over the tokens

The median keeps tokens to which a layer adds next to nothing from deciding, as it keeps those with huge activations.
Rounding to a grid moves the gain by some thousandths; a wrong scale moves it by as much as it is wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from qlora_export.types import Float32


@dataclass
class Difference:
    """What is known so far: by token the norms of error and reference, and the products of the gain."""

    errors: list[Float32] = field(default_factory=list)
    norms: list[Float32] = field(default_factory=list)
    product: float = 0.0
    square: float = 0.0

    def add(self, candidate: Float32, reference: Float32) -> None:
        """Take in what both layers add to some tokens, [tokens, width]."""
        with np.errstate(invalid="ignore", over="ignore"):
            self.errors.append(np.linalg.norm(candidate - reference, axis=1))
            centred = reference - reference.mean(axis=0)
            self.product += float(np.vdot(candidate - candidate.mean(axis=0), centred))
        self.norms.append(np.linalg.norm(reference, axis=1))
        self.square += float(np.vdot(centred, centred))

    @property
    def error(self) -> float:
        """Relative to what the reference's layer adds; infinite where it adds nothing, or the candidate NaN."""
        errors, norms = np.concatenate(self.errors), np.concatenate(self.norms).astype(np.float64)
        scales = np.maximum(norms, np.median(norms))
        if not np.isfinite(errors).all() or errors[scales == 0].any():
            return math.inf
        return float(np.divide(errors, scales, out=np.zeros(len(scales)), where=scales > 0).mean())

    @property
    def gain(self) -> float:
        """1 where the candidate's layer adds neither more nor less; also where there is nothing to tell it by."""
        return self.product / self.square if self.square > 0 and math.isfinite(self.product) else 1.0
