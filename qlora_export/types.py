"""The values that pass between rooms: frozen, facts and no behaviour."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Consumes = Literal["merged", "base"]
Onto = Literal["as-trained", "original"]
OntoChoice = Literal["as-trained", "original", "auto"]
# Which values of the base a delta is added to: two that an artifact can be merged onto, and two for dithering: rows as
# training loaded them, and the 4-bit codes of a base that is stored as such.
MergeBase = Literal["as-trained", "original", "stored", "codes"]
Rounding = Literal["nearest", "dithered", "search", "calibrated", "tuned"]
StoredScale = Literal["nested", "F32", "BF16", "F16", "F8_E4M3", "F8_E8M0"]
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FROM_TORCH_NAMES = {name: dtype for dtype, name in TORCH_NAMES.items()}
Provenance = Literal["sidecar", "base", "stated", "assumed"]
# Told how much is done and how much there is in all, and what opens one for a named stage.
Progress = Callable[[int, int], None]
Track = Callable[[str], AbstractContextManager[Progress]]
Options = Mapping[str, str | int | float | bool]


@dataclass(frozen=True)
class TensorSpec:
    """Name, safetensors dtype and shape of a tensor; rows are all leading dimensions together."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        """Name of the module whose weight this is."""
        return self.name.removesuffix(".weight")

    @property
    def columns(self) -> int:
        """Length of a row: the last dimension of a matrix, 1 for vectors and scalars."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        """Number of rows."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TrainedModule:
    """What the sidecar recorded of one quantised module: sha256 of codes and of the absmax state, absmax mean."""

    codes_sha256: str
    absmax_sha256: str
    nested_offset: float | None


@dataclass(frozen=True)
class TrainingQuantization:
    """How the base was quantised while the adapter was trained, and where that knowledge comes from.

    `storage_dtype` is the dtype the base was loaded in (bitsandbytes' `quant_state.dtype`); `weight_roundings` are the
    dtypes that a de-quantised weight is rounded to, in order, before it is multiplied. `exact_nested` says that the
    nearest absmax code was searched exactly (CUDA) instead of by bitsandbytes' CPU table. `quant_type` is `nf4`, `fp4`,
    `int8`, or `none` for an adapter that was trained on 16-bit weights; `skip` names modules that stayed dense.
    """

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    storage_dtype: str = "BF16"
    compute_dtype: str = "BF16"
    weight_roundings: tuple[str, ...] = ("BF16",)
    exact_nested: bool = False
    base_sha256: str | None = None
    modules: Mapping[str, TrainedModule] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = "assumed"
    skip: tuple[str, ...] = ()

    @property
    def recorded(self) -> bool:
        """Whether training itself wrote this down."""
        return self.provenance == "sidecar"


@dataclass(frozen=True)
class Part:
    """One tensor of an output file: full name, safetensors dtype, shape; `file` where it is not one of the model's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = ""


class Piece(NamedTuple):
    """Bytes of a part that are ready to be written at an offset inside it."""

    part: str
    offset: int
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class StoredScales:
    """The scales of a weight stored in 4 bits, float32 a block; of nested ones also codes, second level and offset."""

    scales: Float32
    codes: NDArray[np.uint8] | None = None
    nested_absmax: Float32 | None = None
    offset: float = 0.0
