"""How much of the adapter is left in the shipped weights, layer by layer.

    survival = <decode(shipped) - merge base, delta> / |delta|^2

1 when the whole delta is there, 0 when rounding has erased it; weight error alone prefers the erased one. The shipped
bytes are read from the finished folder, rounded as serving rounds them, row block by row block. For an artifact that
ships the adapter beside its base, the adapter's own product is added. What else is known of a layer comes with it: its
changed codes (`changed_codes.py`), and what calibration wrote down (`layers.py`). Memory: the blocks and 4 bytes for
each block of 64 weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from qlora_export.artifact import Artifact
from qlora_export.drift.changed_codes import TrainedCodes, different_codes, shipped_block, shipped_codes
from qlora_export.drift.layers import KeptLayer, with_calibration
from qlora_export.formats.base import Format
from qlora_export.formats.served_weight import served_rows
from qlora_export.merge.changes import Changes
from qlora_export.merge.companion_files import ADAPTER_FOLDER
from qlora_export.merge.matching import match_adapter
from qlora_export.merge.merged_model import Output
from qlora_export.merge.merged_rows import MergedRows
from qlora_export.planning.plan import ArtifactPlan, Plan, Route
from qlora_export.sources.adapter import open_adapter
from qlora_export.tensors.header import read_header
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import Float32

Shipped = Mapping[str, NDArray[np.uint8]]


def survival(plan: Plan, item: ArtifactPlan, artifact: Artifact) -> dict[str, float]:
    """Survival of the delta by adapted matrix that the format encodes."""
    return {layer.tensor: layer.survival for layer in kept_layers(plan, item, artifact)}


def kept_layers(plan: Plan, item: ArtifactPlan, artifact: Artifact) -> tuple[KeptLayer, ...]:
    """Every adapted matrix that the format encodes, in the order of the model."""
    shipped = _shipped(item, artifact)
    beside = _beside(plan, artifact) if item.form.keeps_adapter else {}
    found = []
    with SourceFiles() as files:
        for name, output in plan.model.changed.items():
            route = item.routes.get(name)
            matrix = len(output.spec.shape) > 1 and not plan.from_adapter(output.source)
            if route is not None and route.form is not None and matrix:
                layer = _Layer(plan, item, route, route.form, output, beside.get(name), shipped, files)
                found.append(layer.kept())
    return with_calibration(found, artifact.manifest)


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


class _Layer:
    """One tensor: the change that was trained, and the change that is found in the shipped bytes."""

    def __init__(
        self,
        plan: Plan,
        item: ArtifactPlan,
        route: Route,
        form: Format,
        output: Output,
        beside: Output | None,
        shipped: Shipped,
        files: SourceFiles,
    ) -> None:
        self._route, self._form, self._shipped = route, form, shipped
        self._compute = plan.training.quantization.compute_dtype
        onto = item.onto if item.form.consumes == "merged" else "as-trained"
        multiple = form.row_multiple(output.layer_spec)
        self._rows = MergedRows(output, plan.training, files, own=False, onto=onto, multiple=multiple)
        self._beside = None if beside is None else self._loaded(beside, files)
        block = shipped_block(shipped, route.spec.name)
        trained = None if block is None else TrainedCodes(output, plan.training, files)
        self._trained_codes = trained if trained is not None and trained.block == block else None

    def kept(self) -> KeptLayer:
        """<found, trained> / |trained|^2, and the share of codes that are others."""
        kept, whole, different = 0.0, 0.0, 0
        for rows in self._rows.blocks:
            base = self._rows.base(rows)
            trained = self._rows.merged(base, rows) - base
            difference = (self._found(rows) - base).astype(np.float64)
            kept += float(difference @ trained)
            whole += float(trained.astype(np.float64) @ trained)
            different += self._different(rows)
        changed = None if self._trained_codes is None else different / max(self._rows.spec.size, 1)
        return KeptLayer(self._rows.spec.name, kept / whole if whole else 1.0, changed)

    def _loaded(self, beside: Output, files: SourceFiles) -> Changes:
        changes = Changes(beside.changes, files, self._rows.spec.columns)
        if changes.observes:
            for rows in self._rows.blocks:
                changes.observe(self._rows.base(rows), rows.start)
            changes.settle()
        return changes

    def _found(self, rows: range) -> Float32:
        if self._route.turned:
            stored = self._form.decode(self._route.spec, self._shipped, range(self._route.spec.rows))
            turned = stored.reshape(self._route.spec.shape).T[rows.start : rows.stop]
            found = np.ascontiguousarray(turned).reshape(-1)
        else:
            found = served_rows(self._form, self._route.spec, self._shipped, rows, self._compute)
        if self._beside is not None:
            self._beside.apply(found, rows.start)
        return found

    def _different(self, rows: range) -> int:
        if self._trained_codes is None:
            return 0
        spec = self._rows.spec
        codes = shipped_codes(self._shipped, spec.name, spec.columns, rows)
        return different_codes(codes, self._trained_codes.of(rows), len(rows) * spec.columns)
