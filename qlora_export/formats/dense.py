"""Dense 16 and 32-bit weights: one part a tensor, the shape of the source, rounded once to nearest even.

On disk: plain safetensors, no `quantization_config`. Cost: 2 or 4 bytes a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_export.errors import InputError
from qlora_export.quant.device import kernels
from qlora_export.quant.floats import all_finite_16
from qlora_export.tensors.dtypes import ITEM_BYTES, narrow, widen
from qlora_export.types import TORCH_NAMES, Consumes, Float32, Part, Piece, TensorSpec, TrainingQuantization

# Exponent bits of infinity, and the largest finite value.
LARGEST = {"F16": (0x7C00, 65504.0), "BF16": (0x7F80, 3.3895314e38)}


@dataclass(frozen=True)
class Dense:
    """Weights of one floating dtype."""

    name: str
    dense_dtype: str
    consumes: Consumes = "merged"
    quantises: bool = False
    keeps_adapter: bool = False
    beside_experts: bool = True

    def obstacle(self, spec: TensorSpec, input_major: bool) -> str | None:
        """None: any tensor can be dense."""
        return None

    def row_multiple(self, spec: TensorSpec) -> int:
        """Any row stands alone."""
        return 1

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """The tensor itself in the dense dtype."""
        return (Part(spec.name, self.dense_dtype, spec.shape),)

    def open(self, spec: TensorSpec) -> DenseEncoder:
        """Start encoding a tensor."""
        return DenseEncoder(spec, self.dense_dtype)

    def decode(self, spec: TensorSpec, parts: Mapping[str, NDArray[np.uint8]], rows: range) -> Float32:
        """Flat float32 values of the stored rows."""
        row_bytes = spec.columns * ITEM_BYTES[self.dense_dtype]
        raw = parts[spec.name][rows.start * row_bytes : rows.stop * row_bytes]
        return widen(raw, self.dense_dtype)

    def quantization_config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """None: nothing is quantised."""
        return None


@dataclass(frozen=True)
class DenseEncoder:
    """Rounds rows; keeps no state."""

    spec: TensorSpec
    dtype: str

    def encode(self, values: Float32, first_row: int) -> Iterable[Piece]:
        """The rows' bytes at their place; raises InputError when a value overflows the dtype."""
        raw = narrow(values, self.dtype)
        exponent, largest = LARGEST.get(self.dtype, (0, 0.0))
        if exponent and not all_finite_16(raw.view(np.uint16), np.uint16(exponent)):
            raise InputError(
                f"tensor {self.spec.name} holds {np.abs(kernels.to_host(values)).max():.6g}, "
                f"{TORCH_NAMES[self.dtype]} ends at {largest:g}",
                "choose a wider dtype for this artifact",
            )
        yield Piece(self.spec.name, first_row * self.spec.columns * ITEM_BYTES[self.dtype], raw)

    def seal(self) -> Iterable[Piece]:
        """Nothing is left to write."""
        return ()


def fp32(training: TrainingQuantization) -> Dense:
    """32-bit weights."""
    return Dense("fp32", "F32")


def bf16(training: TrainingQuantization) -> Dense:
    """bfloat16 weights."""
    return Dense("bf16", "BF16")


def fp16(training: TrainingQuantization) -> Dense:
    """IEEE half-precision weights."""
    return Dense("fp16", "F16")
