"""The correction that a format ships beside a rounded weight: what is left of the error, to the rank that it has."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qlora_export.formats.base import CorrectedFormat
from qlora_export.quant.floats import UInt8
from qlora_export.quant.rounding.low_rank_correction import low_rank_correction
from qlora_export.types import Float32, TensorSpec


def correction_parts(
    form: CorrectedFormat, spec: TensorSpec, rounded: Float32, target: Tensor, hessian: Tensor
) -> dict[str, UInt8]:
    """The bytes of the factors for a weight [out, in] that was rounded, by the second moments of its inputs."""
    error = target - torch.from_numpy(rounded).to(target.device)
    b, a = low_rank_correction(error, hessian, form.rank, lambda factor: factor.bfloat16().float())
    pieces = form.factors(spec, b.cpu().numpy(), a.cpu().numpy())
    return {piece.part: np.ascontiguousarray(piece.data) for piece in pieces}
