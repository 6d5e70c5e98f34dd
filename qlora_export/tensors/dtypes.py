"""The safetensors dtypes: their sizes, and float32 views of their raw bytes.

Raw bytes come and go as flat uint8 arrays, values as flat float32 arrays. Narrowing rounds to nearest even.
"""

from __future__ import annotations

import numpy as np

from qlora_export.quant.device import kernels
from qlora_export.quant.device.kernels import Values, on_device
from qlora_export.quant.floats import Float32, UInt8, narrow_bfloat16, round_bfloat16, round_float16

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")


def widen(raw: UInt8, dtype: str) -> Float32:
    """The float32 values of raw little-endian bytes of a dtype in `FLOATS`; a new array."""
    if dtype == "BF16":
        values: Float32 = kernels.widen(raw.view(np.uint16))
        return values
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32)
    return raw.view(np.float32).copy()


def narrow(values: Values, dtype: str) -> UInt8:
    """Raw bytes of flat float32 values rounded once to a dtype in `FLOATS`; may share memory for F32."""
    if on_device(values):
        return kernels.narrow(values, dtype)
    if dtype == "BF16":
        out = np.empty(values.size, np.uint16)
        narrow_bfloat16(values.view(np.uint32), out)
        return out.view(np.uint8)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            values = values.astype(np.float16)
    raw: UInt8 = values.view(np.uint8)
    return raw


def round_to(values: Values, dtype: str) -> Values:
    """Flat float32 values rounded to a dtype in `FLOATS`, in place where they are numpy's."""
    if on_device(values):
        return kernels.round_to(values, dtype)
    if dtype == "BF16":
        round_bfloat16(values.view(np.uint32))
    if dtype == "F16":
        round_float16(values)
    return values
