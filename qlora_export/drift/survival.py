"""How much of the adapter is left in the shipped weights, layer by layer.

    survival = <decode(shipped) - merge base, delta> / |delta|^2

1 when the whole delta is there, 0 when rounding has erased it; weight error alone prefers the erased one. The shipped
bytes are read from the finished folder, rounded as serving rounds them, row block by row block. For an artifact that
ships the adapter beside its base, the adapter's own product is added. Memory: the blocks and 4 bytes for each block of
64 weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from qlora_export.contracts import Artifact, Float32
from qlora_export.merge.carried import ADAPTER_FOLDER
from qlora_export.merge.delta import LowRankDelta, load_delta
from qlora_export.merge.homes import Adaptation, match_adapter
from qlora_export.merge.trained_base import TrainedBase
from qlora_export.planning import BLOCK_WEIGHTS, ArtifactPlan, Plan
from qlora_export.quant.nf4 import rows_of_whole_blocks
from qlora_export.sources.adapter import open_adapter
from qlora_export.tensors.dtypes import round_to, widen
from qlora_export.tensors.header import StoredTensor, read_header
from qlora_export.tensors.reading import SourceFiles


def survival(plan: Plan, item: ArtifactPlan, artifact: Artifact) -> dict[str, float]:
    """Survival of the delta by adapted tensor."""
    shipped: dict[str, NDArray[np.uint8]] = {}
    for shard in item.layout.shards:
        path = artifact.path / shard.file
        for name, stored in read_header(path).items():
            shipped[name] = np.memmap(path, np.uint8, "r", stored.offset, (stored.bytes,)) if stored.bytes else _EMPTY
    with SourceFiles() as files:
        beside = _adaptations_beside(plan, artifact) if item.form.keeps_adapter else {}
        return {
            name: _survival(
                plan, item, shipped, load_delta(adaptation, files), _delta_beside(beside, name, files), files, name
            )
            for name, adaptation in plan.adaptations.items()
        }


_EMPTY: NDArray[np.uint8] = np.empty(0, np.uint8)


def _adaptations_beside(plan: Plan, artifact: Artifact) -> dict[str, Adaptation]:
    """The adapter that the artifact itself holds."""
    adaptations, _ = match_adapter(open_adapter(artifact.path / ADAPTER_FOLDER), plan.checkpoint)
    return adaptations


def _delta_beside(beside: Mapping[str, Adaptation], name: str, files: SourceFiles) -> LowRankDelta | None:
    return load_delta(beside[name], files) if name in beside else None


def _survival(
    plan: Plan,
    item: ArtifactPlan,
    shipped: Mapping[str, NDArray[np.uint8]],
    delta: LowRankDelta,
    beside: LowRankDelta | None,
    files: SourceFiles,
    name: str,
) -> float:
    tensor, form = plan.checkpoint.tensors[name], item.routes[name].form
    if form is None:
        return 0.0
    base = _MergeBase(plan, item, tensor, files)
    kept, whole = 0.0, 0.0
    for rows in base.blocks:
        change = delta.rows(rows.start, len(rows))
        found = form.decode(tensor.spec, shipped, rows)
        if form.quantises:
            found = round_to(found, plan.training.compute_dtype)
        if beside is not None:
            beside.add(found, rows.start)
        difference = (found - base.rows(rows)).astype(np.float64)
        kept += float(difference @ change)
        whole += float(change.astype(np.float64) @ change)
    return kept / whole


class _MergeBase:
    """The base that an artifact was merged onto, one tensor, by row blocks."""

    def __init__(self, plan: Plan, item: ArtifactPlan, tensor: StoredTensor, files: SourceFiles) -> None:
        self._tensor, self._files, self._storage = tensor, files, plan.training.storage_dtype
        self._original = item.onto == "original" and item.form.consumes == "merged"
        trained = tensor.spec.module in plan.quantised and not self._original
        self._trained = TrainedBase(tensor.spec, plan.training) if trained else None
        form = item.routes[tensor.spec.name].form
        multiple = rows_of_whole_blocks(tensor.spec.columns, plan.training.block_size)
        multiple = math.lcm(multiple, form.row_multiple(tensor.spec) if form else 1)
        height = max(multiple, BLOCK_WEIGHTS // tensor.spec.columns // multiple * multiple)
        starts = range(0, tensor.spec.rows, height)
        self.blocks = [range(start, min(start + height, tensor.spec.rows)) for start in starts]
        if self._trained is not None:
            for rows in self.blocks:
                self._trained.observe(self._stored(rows), rows.start)
            self._trained.settle()

    def rows(self, rows: range) -> Float32:
        values = self._stored(rows)
        return values if self._trained is None else self._trained.rows(values, rows.start)

    def _stored(self, rows: range) -> Float32:
        values = widen(self._files.read(self._tensor, rows.start, len(rows)), self._tensor.spec.dtype)
        return values if self._original else round_to(values, self._storage)
