"""`fp8-block`: FP8 with a scale for every 128 x 128 weights, in the layout of `fp8.py`."""

from __future__ import annotations

from qlora_export.formats.compressed_tensors.fp8 import Float8
from qlora_export.types import TrainingQuantization

BLOCK = 128


def fp8_block(training: TrainingQuantization) -> Float8:
    """Merged weights in FP8 by blocks."""
    return Float8(name="fp8-block", dense_dtype=training.storage_dtype, block=BLOCK)
