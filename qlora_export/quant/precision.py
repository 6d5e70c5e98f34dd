"""Rounding to a 16-bit float in the middle of a float32 computation, as torch does after every operation on one.

torch computes bf16 and fp16 on a CPU in float32 and rounds each result to the dtype, so code that wants its bytes must
round where torch does. Which bits go is a number, 16 for bf16, 13 for fp16, 0 for float32, and not a branch: one kernel
serves the three dtypes and stays free of jumps.

    round(bits) = (bits + half + lowest kept bit) & ~dropped,   ties to even

Magnitudes up to `VANISHING` round to zero.
These scalar functions are compiled into the kernels of other files. numba looks for changes in a kernel's own file
only: after an edit here, remove its cache (`__pycache__/*.nb?`). Cost: six integer operations.
"""

from __future__ import annotations

import numba
import numpy as np

DROPPED_BITS = {"BF16": np.uint32(16), "F16": np.uint32(13), "F32": np.uint32(0)}
VANISHING = {"BF16": np.float32(2.0**-134), "F16": np.float32(2.0**-25), "F32": np.float32(0)}
ROUNDER = np.float32(1.5 * 2**23)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def round_normal(value: np.float32, dropped: np.uint32) -> np.float32:
    """The nearest value of the narrower float; for fp16 right only for zero and magnitudes in [2^-14, 65520)."""
    bits = np.float32(value).view(np.uint32)
    shift = np.uint32(dropped & np.uint32(31))
    gone = np.uint32(np.uint32(np.uint32(1) << shift) - np.uint32(1))
    half = np.uint32(gone >> np.uint32(1))
    kept = np.uint32(np.uint32(bits >> shift) & np.uint32(gone & np.uint32(1)))
    return np.uint32(np.uint32(np.uint32(bits + half) + kept) & np.uint32(~gone)).view(np.float32)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def round_any(value: np.float32, dropped: np.uint32) -> np.float32:
    """The nearest value of the narrower float, with fp16's subnormals and infinities; not for inner loops."""
    if dropped == np.uint32(13):
        magnitude = np.float32(abs(value))
        if magnitude < np.float32(2**-14):
            step = np.float32(np.float32(magnitude + np.float32(0.5)) - np.float32(0.5))
            return np.float32(np.copysign(step, value))
        if magnitude >= np.float32(65520):
            return np.float32(np.copysign(np.float32(np.inf), value))
    rounded: np.float32 = round_normal(value, dropped)
    return rounded


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def to_int8(value: np.float32) -> np.int8:
    """The nearest integer of a value in [-128, 127], ties to even: the sum's last byte is the integer's."""
    return np.int8(np.float32(value + ROUNDER).view(np.int32))
