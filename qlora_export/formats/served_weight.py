"""The weights that serving multiplies with, from stored parts: decoded, rounded as it rounds, and what lies beside."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from qlora_export.formats.base import CorrectedFormat, Format
from qlora_export.tensors.dtypes import round_to
from qlora_export.types import Float32, TensorSpec


def served_rows(
    form: Format, spec: TensorSpec, parts: Mapping[str, NDArray[np.uint8]], rows: range, compute_dtype: str
) -> Float32:
    """Flat float32 values of whole blocks of rows; quantised ones are rounded to the dtype that serving computes in.

    A correction is a product of its own, which is added to the rounded weight in float32.
    """
    if isinstance(form, CorrectedFormat):
        weights = served_rows(form.stored, spec, parts, rows, compute_dtype)
        weights += form.product(spec, parts, rows)
        return weights
    values = form.decode(spec, parts, rows)
    rounded: Float32 = round_to(values, compute_dtype) if form.quantises else values
    return rounded
