"""The first value of a stored tensor that is NaN or infinite, found by one read in small blocks.

In every float dtype such values have all exponent bits set, but for the 8-bit ones without infinity. Cost: the read; a
block of 2 MiB is checked in its cache.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qlora_export.quant.floats import UInt8, all_finite, all_finite_16
from qlora_export.tensors.dtypes import ITEM_BYTES
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.reading import SourceFiles

BLOCK_BYTES = 1 << 21
EXPONENTS = {"BF16": np.uint16(0x7F80), "F16": np.uint16(0x7C00)}


def first_nonfinite(files: SourceFiles, tensor: StoredTensor) -> int | None:
    """The place of the first value that is not finite; None where all are, as integers always are."""
    if tensor.spec.dtype not in FLOAT_DTYPES:
        return None
    for first in range(0, tensor.bytes, BLOCK_BYTES):
        raw = files.read_bytes(tensor, first, min(BLOCK_BYTES, tensor.bytes - first))
        if not _finite(raw, tensor.spec.dtype):
            bad = _nonfinite(raw, tensor.spec.dtype)
            return first // ITEM_BYTES[tensor.spec.dtype] + int(bad.argmax())
    return None


def _finite(raw: UInt8, dtype: str) -> bool:
    """Whether all values of a block are finite, by the fast kernels where there is one."""
    if dtype == "F32":
        return bool(all_finite(raw.view(np.uint32)))
    if dtype in EXPONENTS:
        return bool(all_finite_16(raw.view(np.uint16), EXPONENTS[dtype]))
    return not _nonfinite(raw, dtype).any()


def _nonfinite(raw: UInt8, dtype: str) -> NDArray[np.bool_]:
    """Which values of a block are not finite."""
    if dtype in EXPONENTS:
        return np.asarray((raw.view(np.uint16) & EXPONENTS[dtype]) == EXPONENTS[dtype])
    if dtype == "F8_E4M3":
        return np.asarray((raw & 0x7F) == 0x7F)
    if dtype == "F8_E5M2":
        return np.asarray((raw & 0x7C) == 0x7C)
    if dtype == "F8_E8M0":
        return np.asarray(raw == 0xFF)
    wide = np.float64 if dtype == "F64" else np.float32
    return np.asarray(~np.isfinite(raw.view(wide)), np.bool_)


FLOAT_DTYPES = ("F64", "F32", *EXPONENTS, "F8_E4M3", "F8_E5M2", "F8_E8M0")
