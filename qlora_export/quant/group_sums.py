"""Sums over the values of a group that choose its scale, whatever its levels are.

    error(s) = sum_i (x_i - s * nearest(x_i / s))^2         refit = sum_i x_i l_i / sum_i l_i^2,  l_i = nearest(x_i / s)

`nearest(place, levels)` is a compiled function, and `levels` what it knows the levels by. Errors of all candidates are
summed side by side, in the order of the columns, in float32 for at most `PIECE` of them, so they depend neither on the
width of a machine's vectors nor on the cut into row blocks. These become part of the kernels that call them, with the
`nearest` they hand in: after an edit here, remove the cache (`__pycache__/*.nb?`), as after one in `precision.py`.
Cost: one evaluation of `nearest` for every value and candidate.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from qlora_export.quant.floats import Float32

Float64 = NDArray[np.float64]
# So many columns are summed in float32 before the sum joins the float64 total.
PIECE = 128


@numba.njit(nogil=True, error_model="numpy", inline="always")  # type: ignore[untyped-decorator]
def add_errors(
    part: Float32, scales: Float32, reciprocals: Float32, nearest: Any, levels: Any, sums: Float32, totals: Float64
) -> None:
    """Add the squared error of every scale to `totals`; `sums` is scratch of the same length."""
    for first in range(0, part.size, PIECE):
        sums[:] = 0
        for value in part[first : first + PIECE]:
            for candidate in range(scales.size):
                gap = value - nearest(value * reciprocals[candidate], levels) * scales[candidate]
                sums[candidate] += gap * gap
        for candidate in range(scales.size):
            totals[candidate] += sums[candidate]


@numba.njit(nogil=True, error_model="numpy", inline="always")  # type: ignore[untyped-decorator]
def products_of(part: Float32, reciprocal: np.float32, nearest: Any, levels: Any) -> tuple[float, float]:
    """`sum x l` and `sum l^2` for the levels that a scale chooses."""
    product, square = np.float64(0), np.float64(0)
    for value in part:
        level = np.float64(nearest(value * reciprocal, levels))
        product += level * np.float64(value)
        square += level * level
    return product, square
