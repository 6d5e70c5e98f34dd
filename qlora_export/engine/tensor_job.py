"""One stored tensor on its way through the engine: observe, settle, encode every row block, seal.

    raw rows -> float32 -> [round to the training's storage dtype -> NF4 and back] -> changes -> encode -> write

What dithers takes the rows before NF4, or the codes of a base that is stored as such and what the changes add.

Blocks are independent, so any thread may take any of them in any order: the bytes come out the same. What needs the
whole tensor first (the mean of the absmax, the column norms of DoRA) is observed in a pass of its own; what needs it
last is written by the seal. A weight that is stored [in, out] moves as a whole, transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import numpy as np

from qlora_export.errors import Refused
from qlora_export.formats.base import DitheringEncoder, DitheringFormat, TensorEncoder
from qlora_export.merge.base_rows import BaseRows, Rows, require_finite
from qlora_export.merge.changes import Changes, LowRank
from qlora_export.planning.plan import ArtifactPlan, Plan, Route, route_parts
from qlora_export.quant.device import kernels
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
        self._source = source
        self._files = files
        self._destinations = destinations
        self._encoders = [found.open(files) for found in destinations]
        self._encoded = [
            found for found, encoder in zip(destinations, self._encoders, strict=True) if encoder is not None
        ]
        self._rows = None
        self._changes: dict[tuple[str, MergeBase], Changes] = {}
        for found in self._encoded:
            output = found.route.output
            if output.changes and found.merge not in self._changes:
                self._changes[found.merge] = Changes(output.changes, files, output.layer_spec.columns)
        onto_trained = {found.merge for found in self._encoded if self._needs_trained(found)}
        self._merges_in_place = len(onto_trained) == 1
        if self._encoded:
            trained = plan.training.quantization.recorded or bool(onto_trained)
            own = plan.from_adapter(source)
            self._rows = BaseRows(self._encoded[0].route.output, plan.training, files, own, trained)
        self._observing = [(merge, changes) for merge, changes in self._changes.items() if changes.observes]
        if self._observing and self._rows is not None and self._rows.observes:
            raise Refused(
                f"tensor {source.spec.name}: DoRA on an embedding that was quantised in training cannot be merged",
                "give the adapter's training quantisation again",
            )
        if self._rows is not None and self._suits_accelerator(self._rows):
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
            for (_, base), changes in self._observing:
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
            for found, piece in self._pieces(self._rows.take(block.first, block.count), block):
                found.writer.write(piece)

    def _pieces(self, rows: Rows, block: RowBlock) -> Iterator[tuple[Destination, Piece]]:
        """What becomes of a block in every artifact."""
        merged: dict[tuple[str, MergeBase], Values] = {}
        for found, encoder in zip(self._destinations, self._encoders, strict=True):
            if encoder is None:
                continue
            if found.merge not in merged:
                merged[found.merge] = self._merge(rows, found, block)
            values = merged[found.merge]
            if found.route.turned:
                values = np.ascontiguousarray(values.reshape(found.route.output.layer_spec.shape).T).reshape(-1)
            if found.route.base == "codes":
                pieces = cast(DitheringEncoder, encoder).dither(rows.codes, values, block.first)
            else:
                pieces = cast(TensorEncoder, encoder).encode(values, block.first)
            for piece in pieces:
                yield found, piece

    def seal(self) -> None:
        """Write what only the whole tensor decides, copy what is carried, and compare the base with the sidecar."""
        if self._rows is not None and self._rows.base is not None:
            self._rows.base.require_recorded()
        for found, encoder in zip(self._destinations, self._encoders, strict=True):
            if encoder is None:
                self._copy(found)
                continue
            for piece in encoder.seal():
                found.writer.write(piece)

    def _suits_accelerator(self, rows: BaseRows) -> bool:
        """Whether every change has a kernel there; else the processor does it, to the same bytes."""
        plain = all(isinstance(change, LowRank) for found in self._encoded for change in found.route.output.changes)
        return plain and rows.has_bits and (rows.observes or bool(self._changes))

    def _working(self) -> AbstractContextManager[None]:
        accelerator = self._rows.accelerator if self._rows is not None else None
        return accelerator.working() if accelerator is not None else nullcontext()

    def _needs_trained(self, found: Destination) -> bool:
        """Whether the values of training are merged into, or decide what is added to others."""
        changes = self._changes.get(found.merge)
        looks = found.route.base == "stored" and changes is not None and not changes.adds
        return looks or found.route.base in ("as-trained", "codes")

    def _merge(self, rows: Rows, found: Destination, block: RowBlock) -> Values:
        """The rows with every change made; for codes, what the changes add."""
        changes, base = self._changes.get(found.merge), found.route.base
        values = rows.of(base)
        if changes is None:
            return values
        if base == "codes" or (base == "stored" and not changes.adds):
            merged = kernels.copy(rows.trained)
            changes.apply(merged, block.first)
            merged -= rows.trained
            if base == "stored":
                merged += values
        else:
            in_place = self._merges_in_place and rows.owned and base == "as-trained"
            merged = values if in_place else kernels.copy(values)
            changes.apply(merged, block.first)
        return require_finite(merged, found.route.output.layer_spec, str(self._source.stored[0].path), block.first)

    def _copy(self, found: Destination) -> None:
        for tensor in found.copied:
            _copy_tensor(tensor, self._files, found.writer)

    def _blocks(self) -> tuple[RowBlock, ...]:
        """Whole multiples of rows for the base and for every format."""
        if self._rows is None:
            return ()
        spec = self._rows.spec
        multiples = [found.route.form.row_multiple(spec) for found in self._encoded if found.route.form]
        return tuple(RowBlock(rows.start, len(rows)) for rows in self._rows.blocks(*multiples))


def _copy_tensor(tensor: StoredTensor, files: SourceFiles, writer: ShardWriter) -> None:
    for first in range(0, tensor.bytes, COPY_BYTES):
        count = min(COPY_BYTES, tensor.bytes - first)
        writer.write(Piece(tensor.spec.name, first, files.read_bytes(tensor, first, count)))
