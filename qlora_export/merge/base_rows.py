"""Rows of one tensor before anything is merged, as the layer sees them: [out, in]."""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qlora_export.errors import InputError
from qlora_export.merge.merged_model import Output
from qlora_export.merge.trained_base import TrainedBase
from qlora_export.quant.device import kernels
from qlora_export.quant.device.accelerator import BLOCK_WEIGHTS as ACCELERATED_WEIGHTS
from qlora_export.quant.device.accelerator import Accelerator
from qlora_export.quant.device.kernels import Values
from qlora_export.quant.floats import Float32, UInt8
from qlora_export.quant.four_bit import rows_of_whole_blocks
from qlora_export.sources.weights import FourBitWeight
from qlora_export.tensors.dtypes import round_to
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import MergeBase, TensorSpec, TrainingQuantization

# Weights that a worker moves at once: enough for the interpreter not to matter, few enough to stay in the caches.
BLOCK_WEIGHTS = 1 << 18
# Low-rank products take rows by twos.
PAIR = 2


@dataclass(frozen=True)
class Training:
    """What training made of the base: its quantisation, and the stored modules that were quantised."""

    quantization: TrainingQuantization
    quantised: AbstractSet[str]


class Rows:
    """The same rows as stored, as loaded and as trained with, flat, each made when it is asked for.

    Arrays may be shared and are not changed, but for `trained` where it is made by quantising, by whom alone takes it.
    """

    def __init__(self, base: BaseRows, first: int, count: int) -> None:
        self._base = base
        self._first = first
        self._count = count

    @cached_property
    def bits(self) -> Values | None:
        """As bf16 where that is what training loaded, on the accelerator if there is one."""
        return self._base.bits(self._first, self._count)

    @cached_property
    def original(self) -> Values:
        """The stored values; of a quantised base, decoded and rounded as they were multiplied with."""
        if self.bits is not None:
            return self._base.require_finite(kernels.widen(self.bits), self._first)
        return self._base.original(self._first, self._count)

    @cached_property
    def stored(self) -> Values:
        """Rounded to the dtype that training loaded them in."""
        return self.original if self.bits is not None else self._base.stored(self.original, self._first)

    @cached_property
    def trained(self) -> Values:
        """Quantised to 4 bits and back, where training did that."""
        if self._base.base is None:
            return self.stored
        return self._base.base.rows(self.stored if self.bits is None else self.bits, self._first)

    @property
    def codes(self) -> UInt8:
        """The packed codes, where they are stored in 4 bits."""
        return self._base.codes(self._first, self._count)

    def of(self, base: MergeBase) -> Values:
        """The values that a delta is added to; a delta that goes onto codes is that of the trained ones."""
        if base == "original":
            return self.original
        return self.stored if base == "stored" else self.trained


class BaseRows:
    """One tensor: with `trained`, observe every row, settle, then take each row once; else take rows at once.

    `own` says that the values come from the adapter: they were trained as they are, and nothing is rounded. Rows that
    are bf16 as they were loaded go to the `accelerator`, if it is given.
    """

    accelerator: Accelerator | None = None

    def __init__(self, output: Output, training: Training, files: SourceFiles, own: bool, trained: bool) -> None:
        self._output = output
        self._files = files
        self._own = own
        self._training = training.quantization
        spec = output.layer_spec
        quantised = spec.module in training.quantised and spec.name.endswith(".weight") and not own
        requantised = quantised and output.source.storage in ("plain", "fp8") and trained
        self.spec: TensorSpec = spec
        self.base = TrainedBase(spec, training.quantization) if requantised else None

    def blocks(self, *multiples: int) -> list[range]:
        """All rows in blocks of about as many values as suit, each of whole multiples; one block where all turn."""
        spec = self.spec
        if self._output.transposed or not spec.size:
            return [range(spec.rows)] if spec.size else []
        multiple = self.whole_rows(*multiples)
        weights = BLOCK_WEIGHTS if self.accelerator is None else ACCELERATED_WEIGHTS
        fitting = weights // max(spec.columns, 1) // multiple
        height = max(1, fitting - fitting % PAIR) * multiple
        return [range(first, min(first + height, spec.rows)) for first in range(0, spec.rows, height)]

    def whole_rows(self, *multiples: int) -> int:
        """Fewest rows that hold whole blocks of training, of the source, and of whatever else has such multiples."""
        whole = rows_of_whole_blocks(self.spec.columns, self._training.block_size)
        return math.lcm(self._output.source.row_multiple, whole, *multiples)

    @property
    def observes(self) -> bool:
        """Whether every row must be observed first."""
        return self.base is not None

    def observe(self, first: int, count: int) -> None:
        """First pass over some rows."""
        if self.base is None:
            return
        bits = self.bits(first, count)
        if bits is None or not self.base.observe(bits, first):
            self.base.observe(self.stored(self.original(first, count), first), first)

    def settle(self) -> None:
        """End of the first pass."""
        if self.base is not None:
            self.base.settle()

    def take(self, first: int, count: int) -> Rows:
        """The rows; with a trained base, each exactly once."""
        rows = Rows(self, first, count)
        if self.base is not None:
            _ = rows.trained  # its digest counts every row, wanted or not
        return rows

    @property
    def has_bits(self) -> bool:
        """Whether the rows are bf16 and were loaded as they are, so that they need not become float32 first."""
        source = self._output.source
        plain = source.storage == "plain" and not self._output.transposed
        return plain and source.spec.dtype == self._training.storage_dtype == "BF16"

    def bits(self, first: int, count: int) -> Values | None:
        """Such rows as they are stored, on the accelerator if there is one; None for others."""
        if not self.has_bits:
            return None
        bits = self._files.read(self._output.source.stored[0], first, count).view(np.uint16)
        return bits if self.accelerator is None else self.accelerator.send(bits)

    def codes(self, first: int, count: int) -> UInt8:
        """The packed codes of some rows."""
        source = self._output.source
        if not isinstance(source, FourBitWeight):
            raise ValueError(f"{self.spec.name} has no 4-bit codes")
        return source.packed(self._files, first, count)

    def original(self, first: int, count: int) -> Values:
        """The stored values."""
        source = self._output.source
        if self._output.transposed:
            whole = source.rows(self._files, 0, source.spec.rows).reshape(source.spec.shape)
            values = np.ascontiguousarray(whole.T[first : first + count]).reshape(-1)
        else:
            values = source.rows(self._files, first, count)
        roundings: tuple[str, ...] = ()
        if source.storage in ("nf4", "fp4"):
            roundings = self._training.weight_roundings
        elif source.storage == "fp8":
            roundings = (source.spec.dtype,)
        for dtype in roundings:
            values = round_to(values, dtype)
        return self.require_finite(values, first)

    def require_finite(self, values: Values, first: int) -> Values:
        """The values themselves, if they are finite."""
        return require_finite(values, self.spec, str(self._output.source.stored[0].path), first)

    def stored(self, values: Float32, first: int) -> Values:
        """The values in the dtype that training loaded them in."""
        storage = self._training.storage_dtype
        if self._own or self._output.source.storage not in ("plain", "fp8") or self.spec.dtype == storage:
            return values
        return self.require_finite(round_to(values.copy(), storage), first)


def require_finite(values: Values, spec: TensorSpec, place: str, first_row: int) -> Values:
    """The flat values themselves; raises InputError naming the first that is NaN or infinite."""
    if not kernels.all_finite(values):
        values = kernels.to_host(values)
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        row, column = divmod(bad, spec.columns)
        raise InputError(
            f"{place}: tensor {spec.name} is {values[bad]} in row {first_row + row}, column {column}",
            "a model with NaN or infinite weights cannot be released; take an earlier checkpoint",
        )
    return values
