"""What a format is: it knows from a shape what it writes, encodes rows, seals a tensor, and decodes it back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qlora_export.types import (
    Consumes,
    Float32,
    Part,
    Piece,
    Rounding,
    StoredScale,
    StoredScales,
    TensorSpec,
    TrainingQuantization,
)


class TensorEncoder(Protocol):
    """Encodes one tensor, row block by row block in any order, from several threads at once."""

    def encode(self, values: Float32, first_row: int) -> Iterable[Piece]:
        """Encode whole rows, given flat; `first_row` is a multiple of the format's `row_multiple`."""
        ...

    def seal(self) -> Iterable[Piece]:
        """What can only be written when every row has been seen."""
        ...


class Format(Protocol):
    """A safetensors format: which parts a weight becomes, and the maths both ways."""

    name: str
    consumes: Consumes
    quantises: bool
    keeps_adapter: bool
    beside_experts: bool  # whether a folder loads in which experts stay dense
    dense_dtype: str

    def obstacle(self, spec: TensorSpec, input_major: bool) -> str | None:
        """Why a layer of this shape [out, in] cannot be encoded; an `input_major` module stores [in, out]."""
        ...

    def row_multiple(self, spec: TensorSpec) -> int:
        """Fewest rows that hold whole blocks."""
        ...

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """The exact parts that `spec` becomes, known from its header alone."""
        ...

    def open(self, spec: TensorSpec) -> TensorEncoder:
        """Start encoding a tensor."""
        ...

    def decode(self, spec: TensorSpec, parts: Mapping[str, NDArray[np.uint8]], rows: range) -> Float32:
        """Flat float32 values of whole blocks of rows, from the raw bytes of the whole parts."""
        ...

    def quantization_config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """The `quantization_config` of config.json; `kept` names the linear modules that stay dense."""
        ...


@runtime_checkable
class RoundingFormat(Format, Protocol):
    """A format that knows more than rounding to the nearest level of an absmax, without data."""

    @property
    def roundings(self) -> tuple[Rounding, ...]:
        """What it knows beside nearest."""
        ...

    def rounded(self, rounding: Rounding, training: TrainingQuantization, seed: int) -> Format:
        """The format with one of them; `seed` is that of random numbers."""
        ...


class DitheringEncoder(Protocol):
    """Adds deltas to a weight that is stored in 4 bits, row block by row block in any order."""

    def dither(self, codes: NDArray[np.uint8], delta: Float32, first_row: int) -> Iterable[Piece]:
        """Whole rows: their packed codes, and the flat delta in the weight's own units."""
        ...

    def seal(self) -> Iterable[Piece]:
        """What can only be written when every row has been seen."""
        ...


@runtime_checkable
class DitheringFormat(Format, Protocol):
    """A format that can add a delta to the codes of a stored weight."""

    def open_on(self, spec: TensorSpec, stored: StoredScales) -> DitheringEncoder:
        """Start on a weight with these scales."""
        ...


@dataclass(frozen=True)
class LevelGrid:
    """What a format can hold of a weight: ascending `levels` times a scale for each `group` of consecutive columns.

    A scale is stored in the dtype `scales`, or `nested`: as an 8-bit code of bitsandbytes' double quantisation. It is
    shared by `height` consecutive rows, the last of which may be fewer; one in e4m3 is divided by `global_scale`.
    """

    levels: tuple[float, ...]
    group: int
    scales: StoredScale
    height: int = 1
    global_scale: float = 1.0


@dataclass(frozen=True)
class Chosen:
    """What rounding chose for a weight: numbers of levels, uint8 [rows, columns], and scales float32 [blocks, groups].

    A block is the rows that share a scale, most often one. The scales are such as can be stored; nested ones with their
    `offset` and `nested_absmax`, float32, one for each 256.
    """

    codes: NDArray[np.uint8]
    scales: Float32
    offset: float = 0.0
    nested_absmax: Float32 | None = None


@runtime_checkable
class GridFormat(Format, Protocol):
    """A format on whose grid levels and scales can be chosen by other rules than the nearest level of an absmax."""

    def grid(self, spec: TensorSpec) -> LevelGrid | None:
        """The grid of a layer [out, in]; None when its groups run over row ends."""
        ...

    def assemble(self, spec: TensorSpec, chosen: Chosen) -> Iterable[Piece]:
        """Every part of the layer, whole, from what was chosen."""
        ...

    def chosen(self, spec: TensorSpec, parts: Mapping[str, NDArray[np.uint8]]) -> Chosen:
        """What was chosen, from the raw bytes of the whole parts."""
        ...


@runtime_checkable
class CorrectedFormat(GridFormat, Protocol):
    """A format that ships an adapter beside its weights, which makes up for some of what rounding them left wrong.

    What serving multiplies with is the weight that `stored` decodes, and B A [out, in] added to it in float32.
    """

    rank: int

    @property
    def stored(self) -> GridFormat:
        """The format of the weights without their correction."""
        ...

    def corrected(self, layers: Mapping[str, TensorSpec]) -> Format:
        """The format for layers [out, in] by their live modules; raises UsageError where no rank fits the budget."""
        ...

    def corrects(self, spec: TensorSpec) -> bool:
        """Whether a layer has a correction."""
        ...

    def factors(self, spec: TensorSpec, b: Float32, a: Float32) -> Iterable[Piece]:
        """The parts of B [out, rank] and A [rank, in], whose values can be stored."""
        ...

    def product(self, spec: TensorSpec, parts: Mapping[str, NDArray[np.uint8]], rows: range) -> Float32:
        """Flat float32 values of B A for some rows."""
        ...

    def adapter_config(self) -> dict[str, Any]:
        """The `adapter_config.json` of the correction."""
        ...


@runtime_checkable
class MixedFormat(Format, Protocol):
    """A format that is another one for some layers."""

    def of(self, spec: TensorSpec) -> Format:
        """The format of a layer."""
        ...


@runtime_checkable
class HoldingFormat(Protocol):
    """A format whose encoders keep parts of a tensor until the seal, more than a scale for each block."""

    def held_bytes(self, spec: TensorSpec) -> int:
        """What an encoder of this tensor holds."""
        ...
