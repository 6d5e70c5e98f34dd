"""8-bit integers with one absmax a row, byte for byte as bitsandbytes 0.50's `int8_vectorwise_quant` on a CPU.

    code = nearest(w * ((1 / absmax) * 127)),   w' = code * absmax * 0.007874015718698502

Weights are fp16 there, whatever the model is in, and the arithmetic is float32; a number divided by a tensor is the
reciprocal times the number in torch, which is another float32 than the quotient. A row of zeros has zero codes, where
bitsandbytes converts NaN, which is zero on x86 too. An absmax may be another than the row's own, where rows are clipped
to it first. Source: bitsandbytes `backends/default/ops.py`, LLM.int8
(arXiv 2208.07339). Cost: two passes over a row in the cache to encode, one to decode.
"""

from __future__ import annotations

import numba
import numpy as np

from qlora_export.quant.floats import Float32
from qlora_export.quant.mse_float_scales import INTEGERS, search_float_groups
from qlora_export.quant.precision import to_int8
from qlora_export.quant.scales import Int8

STEP = np.float32(7.874015718698502e-3)
# What codes from -127 to 127 stand for, in parts of the absmax.
LEVELS: Float32 = np.arange(-127, 128, dtype=np.float32) * STEP


def searched_absmax(values: Float32, absmax: Float32) -> Float32:
    """The absmax [rows, 1] of least squared error of [rows, columns]; the row's own, `absmax`, where none is better."""
    scales = absmax * STEP
    found = search_float_groups(values, scales, INTEGERS, lambda tried: tried)
    return np.where(found == scales, absmax, found * np.float32(127))


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def encode(values: Float32, absmax: Float32, out: Int8) -> None:
    """Codes of [rows, columns] into `out` of the same shape; `absmax` [rows, 1] is from `scales.absmax`."""
    for row in range(values.shape[0]):
        part, codes = values[row], out[row]
        steps = np.float32(1) / absmax[row, 0] * np.float32(127) if absmax[row, 0] else np.float32(0)
        for index in range(part.size):
            codes[index] = to_int8(part[index] * steps)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def decode(codes: Int8, absmax: Float32, out: Float32) -> None:
    """The values of codes [rows, columns] into float32 `out`."""
    for row in range(codes.shape[0]):
        part, values, largest = codes[row], out[row], absmax[row, 0]
        for index in range(part.size):
            values[index] = np.float32(part[index]) * largest * STEP
