"""How much of the adapter is left in the shipped weights, layer by layer.

    survival = <decode(shipped) - merge base, delta> / |delta|^2

1 when the whole delta is there, 0 when rounding has erased it; weight error alone prefers the erased one. The shipped
bytes are read from the finished folder, rounded as serving rounds them, row block by row block. For an artifact that
ships the adapter beside its base, the adapter's own product is added. Memory: the blocks and 4 bytes for each block of
64 weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from qlora_export.contracts import Artifact, Float32
from qlora_export.merge.base_rows import BaseRows
from qlora_export.merge.carried import ADAPTER_FOLDER
from qlora_export.merge.changes import Changes
from qlora_export.merge.homes import match_adapter
from qlora_export.merge.merged_model import Output
from qlora_export.planning import ArtifactPlan, Plan, Route
from qlora_export.sources.adapter import open_adapter
from qlora_export.tensors.dtypes import round_to
from qlora_export.tensors.header import read_header
from qlora_export.tensors.reading import SourceFiles

Shipped = Mapping[str, NDArray[np.uint8]]


def survival(plan: Plan, item: ArtifactPlan, artifact: Artifact) -> dict[str, float]:
    """Survival of the delta by adapted matrix that the format encodes."""
    shipped = _shipped(item, artifact)
    beside = _beside(plan, artifact) if item.form.keeps_adapter else plan.model.changed
    found = {}
    with SourceFiles() as files:
        for name, output in plan.model.changed.items():
            route = item.routes.get(name)
            matrix = len(output.spec.shape) > 1 and not plan.from_adapter(output.source)
            if route is not None and route.form is not None and matrix:
                found[name] = _Survival(plan, item, route, output, beside[name], files).of(shipped)
    return found


def _shipped(item: ArtifactPlan, artifact: Artifact) -> Shipped:
    """The raw bytes of every part of a finished folder."""
    shipped: dict[str, NDArray[np.uint8]] = {}
    for shard in item.layout.shards:
        path = artifact.path / shard.file
        for name, stored in read_header(path).items():
            shipped[name] = np.memmap(path, np.uint8, "r", stored.offset, (stored.bytes,)) if stored.bytes else _EMPTY
    return shipped


_EMPTY: NDArray[np.uint8] = np.empty(0, np.uint8)


def _beside(plan: Plan, artifact: Artifact) -> dict[str, Output]:
    """What the adapter that the artifact itself holds makes of the base."""
    return match_adapter(open_adapter(artifact.path / ADAPTER_FOLDER), plan.checkpoint).model.changed


class _Survival:
    """One tensor: the change that was trained, and the change that is found in the shipped bytes."""

    def __init__(
        self, plan: Plan, item: ArtifactPlan, route: Route, output: Output, beside: Output, files: SourceFiles
    ) -> None:
        self._item, self._route = item, route
        self._compute = plan.training.quantization.compute_dtype
        original = item.onto == "original" and item.form.consumes == "merged"
        self._base = BaseRows(output, plan.training, files, own=False, trained=not original)
        self._original = original
        self._changes = Changes(output.changes, files, self._base.spec.columns)
        self._beside = Changes(beside.changes, files, self._base.spec.columns) if item.form.keeps_adapter else None
        self._blocks = self._base.blocks(route.form.row_multiple(self._base.spec) if route.form else 1)

    def of(self, shipped: Shipped) -> float:
        """<found, trained> / |trained|^2."""
        self._observe()
        kept, whole = 0.0, 0.0
        for rows in self._blocks:
            base = self._rows(rows)
            trained = _changed(self._changes, base, rows) - base
            difference = (self._found(shipped, rows) - base).astype(np.float64)
            kept += float(difference @ trained)
            whole += float(trained.astype(np.float64) @ trained)
        return kept / whole if whole else 1.0

    def _observe(self) -> None:
        if self._base.observes:
            for rows in self._blocks:
                self._base.observe(rows.start, len(rows))
            self._base.settle()
        for changes in (self._changes, self._beside):
            if changes is not None and changes.observes:
                for rows in self._blocks:
                    changes.observe(self._rows(rows), rows.start)
                changes.settle()

    def _rows(self, rows: range) -> Float32:
        taken = self._base.take(rows.start, len(rows))
        values: Float32 = taken.original if self._original else taken.trained
        return values

    def _found(self, shipped: Shipped, rows: range) -> Float32:
        form = self._route.form
        if form is None:
            raise ValueError(f"{self._route.spec.name}: nothing encodes it")
        if self._route.turned:
            stored = form.decode(self._route.spec, shipped, range(self._route.spec.rows))
            turned = stored.reshape(self._route.spec.shape).T[rows.start : rows.stop]
            found = np.ascontiguousarray(turned).reshape(-1)
        else:
            found = form.decode(self._route.spec, shipped, rows)
        if form.quantises:
            found = round_to(found, self._compute)
        return found if self._beside is None else _changed(self._beside, found, rows)


def _changed(changes: Changes, values: Float32, rows: range) -> Float32:
    changed = values.copy()
    changes.apply(changed, rows.start)
    return changed
