"""What a format is: it knows from a shape what it writes, encodes rows, seals a tensor, and decodes it back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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

# The raw bytes of whole parts, by name.
Stored = Mapping[str, NDArray[np.uint8]]


class TensorEncoder(Protocol):
    """Encodes one tensor, row block by row block in any order, from several threads at once."""

    def encode(self, values: Float32, first_row: int) -> Iterable[Piece]:
        """Encode whole rows, given flat; `first_row` is a multiple of the format's `row_multiple`."""
        ...

    def seal(self) -> Iterable[Piece]:
        """What can only be written when every row has been seen."""
        ...


@dataclass(frozen=True, kw_only=True)
class Format(ABC):
    """A safetensors format: which parts a weight becomes, and the maths both ways.

    Most take any layer, row by row, and encode merged weights on a grid; a format states where it differs.
    """

    name: str
    dense_dtype: str
    consumes: Consumes = "merged"
    quantises: bool = True
    keeps_adapter: bool = False
    beside_experts: bool = True  # whether a folder loads in which experts stay dense
    searches: bool = False  # whether scales are those of the least squared error

    @property
    def roundings(self) -> tuple[Rounding, ...]:
        """What it knows without data, beside rounding to the nearest level of an absmax."""
        return ("search",)

    def rounded(self, rounding: Rounding, training: TrainingQuantization, seed: int) -> Format:
        """The format with one of its roundings; `seed` is that of random numbers."""
        return replace(self, searches=rounding == "search")

    def obstacle(self, spec: TensorSpec, input_major: bool) -> str | None:
        """Why a layer of this shape [out, in] cannot be encoded; an `input_major` module stores [in, out]."""
        return None

    def row_multiple(self, spec: TensorSpec) -> int:
        """Fewest rows that hold whole blocks."""
        return 1

    @abstractmethod
    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """The exact parts that `spec` becomes, known from its header alone."""

    @abstractmethod
    def open(self, spec: TensorSpec) -> TensorEncoder:
        """Start encoding a tensor."""

    @abstractmethod
    def decode(self, spec: TensorSpec, parts: Stored, rows: range) -> Float32:
        """Flat float32 values of whole blocks of rows, from the raw bytes of the whole parts."""

    def quantization_config(self, kept: Sequence[str]) -> dict[str, Any] | None:
        """The `quantization_config` of config.json; `kept` names the linear modules that stay dense."""
        return None


@dataclass(frozen=True)
class RowEncoder:
    """Encodes rows and keeps nothing of them; `encode_rows` takes the tensor, its rows, and the number of the first.

    What does not depend on rows is `known` from the start.
    """

    encode_rows: Callable[[TensorSpec, Float32, int], Iterable[Piece]]
    spec: TensorSpec
    known: tuple[Piece, ...] = ()

    def encode(self, values: Float32, first_row: int) -> Iterable[Piece]:
        """The pieces of some rows at their places."""
        return self.encode_rows(self.spec, values, first_row)

    def seal(self) -> Iterable[Piece]:
        """What was known."""
        return self.known


class DitheringEncoder(Protocol):
    """Adds deltas to a weight that is stored in 4 bits, row block by row block in any order."""

    def dither(self, codes: NDArray[np.uint8], delta: Float32, first_row: int) -> Iterable[Piece]:
        """Whole rows: their packed codes, and the flat delta in the weight's own units."""
        ...

    def seal(self) -> Iterable[Piece]:
        """What can only be written when every row has been seen."""
        ...


@runtime_checkable
class DitheringFormat(Protocol):
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


@dataclass(frozen=True, kw_only=True)
class GridFormat(Format):
    """A format on whose grid levels and scales can be chosen by other rules than the nearest level of an absmax."""

    @abstractmethod
    def grid(self, spec: TensorSpec) -> LevelGrid | None:
        """The grid of a layer [out, in]; None when its groups run over row ends."""

    @abstractmethod
    def assemble(self, spec: TensorSpec, chosen: Chosen) -> Iterable[Piece]:
        """Every part of the layer, whole, from what was chosen."""

    @abstractmethod
    def chosen(self, spec: TensorSpec, parts: Stored) -> Chosen:
        """What was chosen, from the raw bytes of the whole parts."""


@runtime_checkable
class CorrectedFormat(Protocol):
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

    def product(self, spec: TensorSpec, parts: Stored, rows: range) -> Float32:
        """Flat float32 values of B A for some rows."""
        ...

    def adapter_config(self) -> dict[str, Any]:
        """The `adapter_config.json` of the correction."""
        ...


@runtime_checkable
class MixedFormat(Protocol):
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
