"""One stored tensor on its way through the engine: observe, settle, encode every row block, seal.

    raw rows -> float32 -> [round to the training's storage dtype -> NF4 and back] -> changes -> encode -> write

What dithers takes the rows before NF4, or the codes of a base that is stored as such and what the changes add.

Blocks are independent, so any thread may take any of them in any order: the bytes come out the same. What needs the
whole tensor first (the mean of the absmax, the column norms of DoRA) is observed in a pass of its own; what needs it
last is written by the seal. A weight that is stored [in, out] moves as a whole, transposed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import numpy as np

from qlora_export.engine.merging import Merge, in_place, open_merge
from qlora_export.errors import Refused
from qlora_export.formats.base import DitheringEncoder, DitheringFormat, TensorEncoder
from qlora_export.merge.base_rows import BaseRows, Rows
from qlora_export.merge.changes import LowRank
from qlora_export.planning.plan import ArtifactPlan, Plan, Route, route_parts
from qlora_export.quant.device.accelerator import Accelerator
from qlora_export.quant.device.kernels import Values
from qlora_export.sources.weights import FourBitWeight, Weight
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.reading import SourceFiles
from qlora_export.tensors.writing import ShardWriter
from qlora_export.types import MergeBase, Piece

COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Destination:
    """A tensor of an artifact that is made from a source; without a format, the stored bytes are copied."""

    plan: ArtifactPlan
    writer: ShardWriter
    route: Route

    @property
    def merge(self) -> tuple[str, MergeBase]:
        """Destinations with the same one receive the same values."""
        return (self.route.output.name if self.route.output.changes else "", self.route.base)

    @property
    def copied(self) -> tuple[StoredTensor, ...]:
        """Where bytes lie that are taken as they are: parts that were made before the build, or the base's own."""
        made = self.plan.made.parts
        parts = [part.name for part in route_parts(self.route)] if made else []
        if parts and all(name in made for name in parts):
            return tuple(made[name] for name in parts)
        return self.route.output.source.stored if self.route.form is None else ()

    def open(self, files: SourceFiles) -> TensorEncoder | DitheringEncoder | None:
        """What encodes the tensor; None when its bytes are copied."""
        form, source = self.route.form, self.route.output.source
        if self.copied or form is None:
            return None
        if self.route.base == "codes" and isinstance(form, DitheringFormat) and isinstance(source, FourBitWeight):
            return form.open_on(self.route.spec, source.scales(files))
        return form.open(self.route.spec)


@dataclass(frozen=True)
class RowBlock:
    """Some consecutive rows of a tensor."""

    first: int
    count: int


@dataclass(frozen=True)
class Taker:
    """A destination that is encoded, and what encodes it."""

    destination: Destination
    encoder: TensorEncoder | DitheringEncoder

    def encode(self, values: Values, rows: Rows, block: RowBlock) -> None:
        """Write what becomes of a block's merged values."""
        route = self.destination.route
        if route.turned:
            values = np.ascontiguousarray(values.reshape(route.output.layer_spec.shape).T).reshape(-1)
        if route.base == "codes":
            self.write(cast(DitheringEncoder, self.encoder).dither(rows.codes, values, block.first))
        else:
            self.write(cast(TensorEncoder, self.encoder).encode(values, block.first))

    def write(self, pieces: Iterable[Piece]) -> None:
        """Write pieces at their places."""
        for piece in pieces:
            self.destination.writer.write(piece)


class TensorJob:
    """The work on one stored tensor for all artifacts that are made from it."""

    def __init__(
        self,
        plan: Plan,
        source: Weight,
        files: SourceFiles,
        destinations: Sequence[Destination],
        accelerator: Accelerator | None = None,
    ) -> None:
        self._files = files
        opened = [(found, found.open(files)) for found in destinations]
        self._copied = [found for found, encoder in opened if encoder is None]
        self._takers = [Taker(found, encoder) for found, encoder in opened if encoder is not None]
        groups: dict[tuple[str, MergeBase], list[Taker]] = {}
        for taker in self._takers:
            groups.setdefault(taker.destination.merge, []).append(taker)
        merges = [open_merge(group[0].destination.route, files) for group in groups.values()]
        self._rows = None
        if merges:
            trained = plan.training.quantization.recorded or any(merge.needs_trained for merge in merges)
            self._rows = BaseRows(merges[0].output, plan.training, files, plan.from_adapter(source), trained)
            merges = in_place(merges) if self._rows.base is not None else merges
        self._shares = list(zip(merges, groups.values(), strict=True))
        loaded = [(merge.base, merge.changes) for merge in merges]
        self._observing = [(base, changes) for base, changes in loaded if changes is not None and changes.observes]
        if self._observing and self._rows is not None and self._rows.observes:
            raise Refused(
                f"tensor {source.spec.name}: DoRA on an embedding that was quantised in training cannot be merged",
                "give the adapter's training quantisation again",
            )
        if self._rows is not None and _suits_accelerator(self._rows, merges):
            self._rows.accelerator = accelerator
        self.blocks = self._blocks()

    @property
    def observes(self) -> bool:
        """Whether every block must be observed before the first is encoded."""
        return bool(self._observing) or (self._rows is not None and self._rows.observes)

    def observe(self, block: RowBlock) -> None:
        """First pass over a block."""
        if self._rows is None:
            return
        with self._working():
            self._rows.observe(block.first, block.count)
        if self._observing:
            rows = self._rows.take(block.first, block.count)
            for base, changes in self._observing:
                changes.observe(rows.of(base), block.first)

    def settle(self) -> None:
        """End of the first pass."""
        if self._rows is not None:
            self._rows.settle()
        for _, changes in self._observing:
            changes.settle()

    def encode(self, block: RowBlock) -> None:
        """Second pass over a block: merge, encode and write it."""
        if self._rows is None:
            return
        with self._working():
            rows = self._rows.take(block.first, block.count)
            for merge, takers in self._shares:
                values = merge.values(rows, block.first)
                for taker in takers:
                    taker.encode(values, rows, block)

    def seal(self) -> None:
        """Write what only the whole tensor decides, copy what is carried, and compare the base with the sidecar."""
        if self._rows is not None and self._rows.base is not None:
            self._rows.base.require_recorded()
        for taker in self._takers:
            taker.write(taker.encoder.seal())
        for found in self._copied:
            for tensor in found.copied:
                _copy_tensor(tensor, self._files, found.writer)

    def _working(self) -> AbstractContextManager[None]:
        accelerator = self._rows.accelerator if self._rows is not None else None
        return accelerator.working() if accelerator is not None else nullcontext()

    def _blocks(self) -> tuple[RowBlock, ...]:
        """Whole multiples of rows for the base and for every format."""
        if self._rows is None:
            return ()
        forms = [taker.destination.route.form for taker in self._takers]
        multiples = [form.row_multiple(self._rows.spec) for form in forms if form]
        return tuple(RowBlock(rows.start, len(rows)) for rows in self._rows.blocks(*multiples))


def _suits_accelerator(rows: BaseRows, merges: Iterable[Merge]) -> bool:
    """Whether every change has a kernel there; else the processor does it, to the same bytes."""
    changes = [change for merge in merges for change in merge.output.changes]
    return all(isinstance(change, LowRank) for change in changes) and rows.has_bits and (rows.observes or bool(changes))


def _copy_tensor(tensor: StoredTensor, files: SourceFiles, writer: ShardWriter) -> None:
    for first in range(0, tensor.bytes, COPY_BYTES):
        count = min(COPY_BYTES, tensor.bytes - first)
        writer.write(Piece(tensor.spec.name, first, files.read_bytes(tensor, first, count)))
