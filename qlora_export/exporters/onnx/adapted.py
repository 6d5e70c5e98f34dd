"""The layers of a 4-bit base, and what an adapter adds to each of them: one pair of factors, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_export.errors import PlanRefused, Refused
from qlora_export.merge.changes import LowRank
from qlora_export.merge.matching import match_adapter
from qlora_export.merge.merged_model import MergedModel
from qlora_export.sources.adapter import Adapter
from qlora_export.sources.checkpoint import Checkpoint
from qlora_export.sources.weights import FourBitWeight, PlainWeight
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.reading import SourceFiles
from qlora_export.types import Float32

MERGE_INSTEAD = "choose a merged format"


@dataclass(frozen=True)
class AdaptedLayer:
    """A 4-bit weight, and what the adapter adds to it."""

    weight: FourBitWeight
    change: LowRank | None


@dataclass(frozen=True)
class AdaptedBase:
    """The 4-bit weights by name, and the tensors that are dense, which no adapter changes."""

    layers: Mapping[str, AdaptedLayer]
    dense: tuple[StoredTensor, ...]

    @property
    def changes(self) -> Mapping[str, LowRank]:
        """What the adapter adds, by the module that it is added to."""
        changed = {layer.weight.spec.module: layer.change for layer in self.layers.values()}
        return {module: change for module, change in changed.items() if change is not None}


def adapted_base(checkpoint: Checkpoint, adapter: Adapter) -> AdaptedBase:
    """Match an adapter with a 4-bit base; raises Refused for what is no plain LoRA of its 4-bit layers."""
    match = match_adapter(adapter, checkpoint)
    if match.problems:
        raise PlanRefused(list(match.problems))
    _require_kept(checkpoint, match.model)
    layers, dense = {}, []
    for name, weight in checkpoint.weights.items():
        changes = match.model.outputs[name].changes if name in match.model.outputs else ()
        if isinstance(weight, FourBitWeight):
            layers[name] = AdaptedLayer(weight, _plain(name, changes))
        elif isinstance(weight, PlainWeight) and not changes:
            dense.append(weight.tensor)
        else:
            raise Refused(f"{name}: changed by the adapter and not in 4 bits", MERGE_INSTEAD)
    return AdaptedBase(layers, tuple(dense))


def factors(change: LowRank, files: SourceFiles) -> tuple[Float32, Float32]:
    """A [in, rank] and s B' [rank, out]."""
    return files.values(change.a).T, (files.values(change.b) * np.float32(change.scale)).T


def _require_kept(checkpoint: Checkpoint, model: MergedModel) -> None:
    """Raise Refused for a tensor that the adapter replaces or unties."""
    for output in model.outputs.values():
        kept = output.name in checkpoint.weights and checkpoint.weights.get(output.source.spec.name) is output.source
        if not kept:
            raise Refused(f"{output.name}: the adapter replaces or unties it, so it is no plain LoRA", MERGE_INSTEAD)


def _plain(name: str, changes: tuple[Any, ...]) -> LowRank | None:
    """The only change of a layer; raises Refused for anything but a whole pair of factors."""
    if not changes:
        return None
    found = changes[0]
    if (
        len(changes) > 1
        or not isinstance(found, LowRank)
        or found.transposed
        or found.experts
        or found.blocks != (1, 1)
    ):
        raise Refused(f"{name}: its adapter is no plain LoRA", MERGE_INSTEAD)
    return found
