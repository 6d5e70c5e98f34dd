"""One tensor on its way through the engine: observe, settle, encode every row block, seal.

    raw rows -> float32 -> [round to the training's storage dtype -> NF4 and back] -> + delta -> encode -> write

Blocks are independent, so any thread may take any of them in any order: the bytes come out the same. What needs the
whole tensor first (the mean of the absmax) is observed in a pass of its own; what needs it last is written by the seal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlora_export.contracts import Piece, TensorEncoder
from qlora_export.errors import InputError
from qlora_export.merge.delta import load_delta
from qlora_export.merge.trained_base import TrainedBase
from qlora_export.planning import BLOCK_WEIGHTS, ArtifactPlan, Plan, Route
from qlora_export.quant.floats import Float32, UInt8, all_finite
from qlora_export.quant.nf4 import rows_of_whole_blocks
from qlora_export.tensors.dtypes import FLOATS, ITEM_BYTES, round_to, widen
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.reading import SourceFiles
from qlora_export.tensors.writing import ShardWriter


@dataclass(frozen=True)
class Destination:
    """An artifact that receives this tensor."""

    plan: ArtifactPlan
    writer: ShardWriter
    route: Route
    encoder: TensorEncoder | None


@dataclass(frozen=True)
class RowBlock:
    """Some consecutive rows of a tensor."""

    first: int
    count: int


class TensorJob:
    """The work on one tensor for all artifacts that receive it."""

    def __init__(
        self, plan: Plan, tensor: StoredTensor, files: SourceFiles, writers: Sequence[tuple[ArtifactPlan, ShardWriter]]
    ) -> None:
        self._plan = plan
        self._tensor = tensor
        self._files = files
        self._destinations = [_destination(artifact, writer, tensor) for artifact, writer in writers]
        merged = [d.plan.onto for d in self._destinations if d.plan.form.consumes == "merged"]
        adaptation = plan.adaptations.get(tensor.spec.name)
        self._delta = load_delta(adaptation, files) if adaptation else None
        quantised = tensor.spec.name.endswith(".weight") and tensor.spec.module in plan.quantised
        needed = "as-trained" in merged or plan.training.recorded
        self._base = TrainedBase(tensor.spec, plan.training) if quantised and needed else None
        self.blocks = _blocks(tensor, self._row_multiple())

    @property
    def observes(self) -> bool:
        """Whether every block must be observed before the first is encoded."""
        return self._base is not None

    def observe(self, block: RowBlock) -> None:
        """First pass over a block."""
        if self._base is not None:
            values = self._require_finite(self._read(block), block)
            self._base.observe(self._stored(values, block), block.first)

    def settle(self) -> None:
        """End of the first pass."""
        if self._base is not None:
            self._base.settle()

    def encode(self, block: RowBlock) -> None:
        """Second pass over a block: merge, encode and write it."""
        if self._tensor.spec.dtype not in FLOATS:
            self._copy(self._files.read(self._tensor, block.first, block.count), block)
            return
        original = self._require_finite(self._read(block), block)
        stored = self._stored(original, block)
        trained = stored if self._base is None else self._base.rows(stored, block.first)
        merged: dict[str, Float32] = {}
        for destination in self._destinations:
            onto = destination.plan.onto
            values = stored
            if destination.plan.form.consumes == "merged":
                if onto not in merged:
                    merged[onto] = self._merge(original if onto == "original" else trained, block)
                values = merged[onto]
            if destination.encoder is not None:
                for piece in destination.encoder.encode(values, block.first):
                    destination.writer.write(piece)

    def seal(self) -> None:
        """Write what only the whole tensor decides, and compare the base with the sidecar."""
        if self._base is not None:
            self._base.require_recorded()
        for destination in self._destinations:
            if destination.encoder is not None:
                for piece in destination.encoder.seal():
                    destination.writer.write(piece)

    def _stored(self, values: Float32, block: RowBlock) -> Float32:
        """The values in the dtype that training loaded them in."""
        storage = self._plan.training.storage_dtype
        if self._tensor.spec.dtype == storage:
            return values
        return self._require_finite(round_to(values.copy(), storage), block)

    def _merge(self, values: Float32, block: RowBlock) -> Float32:
        if self._delta is None:
            return values
        merged = values.copy()
        self._delta.add(merged, block.first)
        return self._require_finite(merged, block)

    def _row_multiple(self) -> int:
        multiples = [d.route.form.row_multiple(self._tensor.spec) for d in self._destinations if d.route.form]
        block = self._plan.training.block_size
        multiples.append(rows_of_whole_blocks(self._tensor.spec.columns, block))
        return math.lcm(*multiples)

    def _read(self, block: RowBlock) -> Float32:
        return widen(self._files.read(self._tensor, block.first, block.count), self._tensor.spec.dtype)

    def _copy(self, raw: UInt8, block: RowBlock) -> None:
        offset = block.first * self._tensor.spec.columns * ITEM_BYTES[self._tensor.spec.dtype]
        for destination in self._destinations:
            destination.writer.write(Piece(self._tensor.spec.name, offset, raw))

    def _require_finite(self, values: Float32, block: RowBlock) -> Float32:
        if not all_finite(values.view(np.uint32)):
            bad = int(np.flatnonzero(~np.isfinite(values))[0])
            row, column = divmod(bad, self._tensor.spec.columns)
            raise InputError(
                f"{self._tensor.path}: tensor {self._tensor.spec.name} is {values[bad]} in row {block.first + row}, "
                f"column {column}",
                "a model with NaN or infinite weights cannot be released; take an earlier checkpoint",
            )
        return values


def _destination(artifact: ArtifactPlan, writer: ShardWriter, tensor: StoredTensor) -> Destination:
    route = artifact.routes[tensor.spec.name]
    return Destination(artifact, writer, route, route.form.open(tensor.spec) if route.form else None)


def _blocks(tensor: StoredTensor, multiple: int) -> tuple[RowBlock, ...]:
    """Cut a tensor into blocks of whole multiples of rows, about `BLOCK_WEIGHTS` values each."""
    rows, columns = tensor.spec.rows, max(tensor.spec.columns, 1)
    height = max(multiple, BLOCK_WEIGHTS // columns // multiple * multiple)
    return (
        tuple(RowBlock(first, min(height, rows - first)) for first in range(0, rows, height))
        if tensor.spec.size
        else ()
    )
