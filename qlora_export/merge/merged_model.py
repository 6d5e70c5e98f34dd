"""The merged model as headers show it: every tensor it has, where its values come from, and what changes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_export.merge.changes import Change
from qlora_export.merge.module_names import Names
from qlora_export.sources.weights import Weight
from qlora_export.types import TensorSpec


@dataclass(frozen=True)
class Output:
    """One tensor of a model: `source` gives its values, of the base or of the adapter, `changes` are made in order.

    `transposed` says that the weight is stored [in, out] and belongs to a linear layer all the same (Conv1D): changes
    and quantisation see its transpose. `carried` tensors belong to no parameter of the model and keep their bytes.
    """

    name: str
    source: Weight
    changes: tuple[Change, ...] = ()
    transposed: bool = False
    carried: bool = False

    @property
    def spec(self) -> TensorSpec:
        """Name in the model, dtype and shape of the source's values."""
        return replace(self.source.spec, name=self.name)

    @property
    def layer_spec(self) -> TensorSpec:
        """The same as the layer sees it: [out, in]."""
        shape = self.source.spec.shape
        return replace(self.spec, shape=shape[::-1]) if self.transposed else self.spec


@dataclass(frozen=True)
class MergedModel:
    """All tensors by name; `settings` are keys of config.json that must change with them, None to drop one.

    `dropped` are tensors of the base that the merged model does not have, with the reason; `notes` tell what was done
    beyond adding deltas.
    """

    outputs: Mapping[str, Output]
    settings: Mapping[str, Any] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def changed(self) -> dict[str, Output]:
        """The tensors that the adapter changes."""
        return {name: output for name, output in self.outputs.items() if output.changes}


def unmerged_model(names: Names) -> MergedModel:
    """The base as it is; of a tie that its bytes contradict, config.json says so no more."""
    outputs = {
        name: Output(name, weight, (), name in names.input_major, name in names.carried)
        for name, weight in names.checkpoint.weights.items()
    }
    settings, notes = stated_tie(names)
    return MergedModel(outputs, settings, notes=tuple(notes))


def stated_tie(names: Names) -> tuple[dict[str, Any], list[str]]:
    """The setting and the note for a base whose config.json ties what its bytes do not."""
    if not names.tie_contradicts_bytes:
        return {}, []
    note = "config.json ties the output head to the embedding, the stored ones differ: written as untied, as they are"
    return {"tie_word_embeddings": False}, [note]
