"""The low-rank delta `scale * B @ A`, added to rows of a weight in float32.

The sum over the rank runs in a fixed order without fused multiply-adds, so the result depends neither on how the rows
are cut nor on the machine. Cost: 2 * rank operations a weight; A [rank, in] stays in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from qlora_export.errors import InputError, Refused
from qlora_export.merge.homes import Adaptation
from qlora_export.quant.floats import Float32, all_finite
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.reading import SourceFiles


@dataclass(frozen=True)
class LowRankDelta:
    """A [rank, in] and B [out, rank] in float32, and the scale of their product."""

    a: Float32
    b: Float32
    scale: np.float32

    def add(self, values: Float32, first_row: int) -> None:
        """Add the delta to flat `values`, whole rows from `first_row` on, in place."""
        columns = self.a.shape[1]
        _add_low_rank(values.reshape(-1, columns), self.a, self.b[first_row:], self.scale)

    def rows(self, first_row: int, count: int) -> Float32:
        """The delta of some rows, flat."""
        out = np.zeros(count * self.a.shape[1], np.float32)
        self.add(out, first_row)
        return out


def load_delta(adaptation: Adaptation, files: SourceFiles) -> LowRankDelta:
    """Read both factors; raises InputError on NaN or infinity and Refused when the delta is zero."""
    a, b = (_finite(tensor, files) for tensor in (adaptation.a, adaptation.b))
    if not a.any() or not b.any():
        zero = adaptation.a if not a.any() else adaptation.b
        raise Refused(
            f"{zero.path}: tensor {zero.spec.name} is all zero, so nothing was learned for {adaptation.target}",
            "train longer, or drop the module from the adapter",
        )
    return LowRankDelta(a, b, np.float32(adaptation.scale))


def _finite(tensor: StoredTensor, files: SourceFiles) -> Float32:
    values = files.values(tensor)
    if not all_finite(values.reshape(-1).view(np.uint32)):
        count = int((~np.isfinite(values)).sum())
        raise InputError(
            f"{tensor.path}: tensor {tensor.spec.name} has {count} values that are NaN or infinite",
            "training diverged or the file is damaged; take an earlier checkpoint",
        )
    return values


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _add_low_rank(values: Float32, a: Float32, b: Float32, scale: np.float32) -> None:
    rows, columns = values.shape
    rank = a.shape[0]
    sums = np.empty(columns, np.float32)
    for row in range(rows):
        for column in range(columns):
            sums[column] = np.float32(0)
        for component in range(rank):
            weight = b[row, component]
            for column in range(columns):
                sums[column] += weight * a[component, column]
        for column in range(columns):
            values[row, column] += scale * sums[column]
