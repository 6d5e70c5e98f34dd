"""The answering side of a worker: arrays as rows and columns in little-endian int64 and their values in float32."""

from __future__ import annotations

import os
import struct
from typing import IO

import numpy as np
from numpy.typing import NDArray


def answers() -> IO[bytes]:
    """The stream for answers; stdout is kept for it, whatever a native library prints goes to stderr."""
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return stream


def put(stream: IO[bytes], values: NDArray[np.float32]) -> None:
    """Send an array [rows, columns]."""
    stream.write(struct.pack("<qq", *values.shape))
    stream.write(values.tobytes())
    stream.flush()
