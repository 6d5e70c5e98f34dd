"""From what the adapter changes to the tensors of the merged model: tied pairs, vocabulary, classifier heads.

An output head that is tied to the embedding has no weight of its own. Where training changed one side alone, the live
model was untied, so the merged one is written with both weights and says so in config.json. Trained token rows, copies
that were saved for a resized vocabulary, and adapters with `ensure_weight_tying` change both sides alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_export.errors import InputError, Refused
from qlora_export.merge.changes import Change, LowRank, ReplacedRows
from qlora_export.merge.match_state import MatchState, transposed_values
from qlora_export.merge.merged_model import MergedModel, Output, stated_tie
from qlora_export.merge.module_names import HEAD, Names
from qlora_export.sources.adapter import Adapter
from qlora_export.sources.architecture import CLASSIFIER_HEADS
from qlora_export.sources.checkpoint import Checkpoint
from qlora_export.sources.weights import PlainWeight, Weight
from qlora_export.tensors.dtypes import FLOATS
from qlora_export.tensors.header import StoredTensor
from qlora_export.tensors.reading import same_values


def finish_model(state: MatchState) -> MergedModel:
    """The merged model that a matched draft describes; raises InputError where its parts contradict each other."""
    names, adapter = state.names, state.adapter
    live = {name: list(items) for name, items in state.changes.items()}
    sources: dict[str, Weight] = {name: PlainWeight(tensor) for name, tensor in state.replaced.items()}
    settings, notes = stated_tie(names)
    dropped: dict[str, str] = {}
    added: dict[str, Output] = {}
    if names.head is not None and names.tied and _touches_vocabulary(names, {*live, *sources}):
        pair = TiedPair(state, live, sources)
        if pair.stays_tied:
            pair.keep_tied()
        else:
            added = pair.untie()
            settings["tie_word_embeddings"] = False
            notes.append(
                f"training changed one side of the tied pair {names.embedding} and {names.head}: "
                "both are written, untied"
            )
    checkpoint = names.checkpoint
    outputs = {}
    origin = {_stored_name(names, name): name for name in {*live, *sources}}
    for name, weight in checkpoint.weights.items():
        if adapter.classifier and HEAD.search(weight.spec.module):
            dropped[name] = "a classifier has no output head"
            continue
        known = origin.pop(name, "")
        found = [*state.stored_changes.get(name, ()), *live.get(known, ())]
        carried = name in names.carried and not found and known not in sources
        outputs[name] = Output(name, sources.get(known, weight), tuple(found), name in names.input_major, carried)
    for name in origin.values():
        outputs[name] = Output(name, sources[name], tuple(live.get(name, ())))
    outputs.update(added)
    if adapter.classifier:
        settings |= _classifier_settings(checkpoint, sources)
    settings |= _vocabulary_settings(names, outputs, notes)
    _require_floats(outputs)
    return MergedModel(outputs, settings, dropped, tuple(notes))


def _require_floats(outputs: Mapping[str, Output]) -> None:
    """Raise Refused for a change of what is no float: its bytes would be copied, and the change lost."""
    for name, output in outputs.items():
        if output.changes and output.spec.dtype not in FLOATS:
            raise Refused(
                f"{output.source.stored[0].path}: tensor {name} is {output.spec.dtype}, which no delta can be added to",
                "16 and 32-bit floats can be merged, and weights that are stored quantised with their scales",
            )


def _touches_vocabulary(names: Names, touched: set[str]) -> bool:
    """Whether anything but layers between embedding and head is touched; only then their names are asked for."""
    if names.direct and all(".layers." in name or ".h." in name for name in touched):
        return False
    return bool(touched & {f"{names.embedding}.weight", f"{names.head}.weight"})


class TiedPair:
    """An embedding and the head that shares its weight; `live` and `sources` are changed in place."""

    def __init__(self, state: MatchState, live: dict[str, list[Change]], sources: dict[str, Weight]) -> None:
        self._draft, self._live, self._sources = state, live, sources
        names = state.names
        self._embedding, self._head = f"{names.embedding}.weight", f"{names.head}.weight"
        saved = state.adapter.config.get("modules_to_save") or []
        sides = (f".{self._embedding}", f".{self._head}")
        self._copied = not any(side.endswith(f".{name}.weight") for name in saved for side in sides)
        if self._copied:
            self._share_copies()
        self._share_rows()
        self._base = sources.get(self._embedding) or names.checkpoint.weights[_stored_name(names, self._embedding)]

    @property
    def stays_tied(self) -> bool:
        """Whether training changed both sides alike: rows of tokens, shared copies, or a pair that PEFT kept tied."""
        rows_only = all(isinstance(change, ReplacedRows) for change in self._live.get(self._embedding, ()))
        one_sided = self._head in self._live or self._head in self._sources or not rows_only
        one_sided |= self._embedding in self._sources and not self._copied
        return not one_sided or _tied_in_training(self._draft.adapter, self._draft.names)

    def keep_tied(self) -> None:
        """Give the head, where it is stored, what the embedding has; raises InputError where they differ."""
        if (source := self._sources.pop(self._head, None)) is not None:
            self._require_same(self._base.stored[0], source.stored[0])
        self._require_alike(self._live.pop(self._head, []), self._live.get(self._embedding, []))
        if self._draft.names.parameter(self._head):
            self._live[self._head] = list(self._live.get(self._embedding, ()))
            self._sources[self._head] = self._base

    def untie(self) -> dict[str, Output]:
        """The head as a tensor of its own, where none is stored; token rows that PEFT shares go first."""
        names = self._draft.names
        changes = self._live.pop(self._head, [])
        if changes and self._draft.adapter.config.get("ensure_weight_tying"):
            raise Refused(
                f"{self._draft.adapter.weights}: ensure_weight_tying is set, and {names.head} was adapted beside "
                f"{names.embedding}: peft loads such an adapter as another model than was trained",
                "peft 0.21 ties modules called embed_tokens and lm_head alone; train without ensure_weight_tying",
            )
        rows = [change for change in self._live.get(self._embedding, ()) if isinstance(change, ReplacedRows)]
        if rows and self._head in self._sources:
            raise InputError(
                f"{self._draft.adapter.weights}: tokens were trained in {names.embedding} and {names.head} was saved "
                "whole, which is one weight in the base",
                "train either of them",
            )
        if not any(isinstance(change, ReplacedRows) for change in changes):
            changes = [*rows, *changes]
        shared = self._base if self._copied else names.checkpoint.weights[_stored_name(names, self._embedding)]
        own = self._sources.pop(self._head, None) or shared
        if not names.parameter(self._head):
            return {self._head: Output(self._head, own, tuple(changes))}
        self._live[self._head] = changes
        self._sources[self._head] = own
        return {}

    def _share_copies(self) -> None:
        """PEFT loads saved copies into the one weight, so they must be the same."""
        sides = [name for name in (self._embedding, self._head) if name in self._sources]
        if not sides:
            return
        if len(sides) == 2:
            self._require_same(*(self._sources[name].stored[0] for name in sides))
        self._sources[self._embedding] = self._sources[sides[0]]
        self._sources.pop(self._head, None)

    def _share_rows(self) -> None:
        """Rows of tokens that were saved for both sides are those of the one weight, where they are the same."""
        head, embedding = self._live.get(self._head, []), self._live.get(self._embedding, [])
        rows = [found[0] for found in (head, embedding) if len(found) == 1 and isinstance(found[0], ReplacedRows)]
        if len(rows) == 2 and rows[0].indices == rows[1].indices and same_values(rows[0].rows, rows[1].rows):
            self._draft.account(rows[0].rows)
            del self._live[self._head]

    def _require_alike(self, head: Sequence[Change], embedding: Sequence[Change]) -> None:
        """The head's factors are those of the embedding, transposed, with the same scale."""
        if not head:
            return
        first, second = head[0], embedding[0] if embedding else None
        alike = (
            len(head) == len(embedding) == 1
            and isinstance(first, LowRank)
            and isinstance(second, LowRank)
            and first.scale == second.scale
            and transposed_values(first.a, second.b)
            and transposed_values(first.b, second.a)
        )
        if not alike:
            names = ", ".join(tensor.spec.name for change in head for tensor in change.tensors)
            raise InputError(
                f"{self._draft.adapter.weights}: {names}: differs from the tied embedding, ensure_weight_tying is set",
                "one weight cannot be both; train without ensure_weight_tying",
            )
        for change in head:
            for tensor in change.tensors:
                self._draft.account(tensor)

    def _require_same(self, first: StoredTensor, second: StoredTensor) -> None:
        if not same_values(first, second):
            raise InputError(
                f"{self._draft.adapter.weights}: {second.spec.name} is not the same as {first.spec.name}, "
                "which share one weight in the base",
                "save the adapter again",
            )
        self._draft.account(second)


def _tied_in_training(adapter: Adapter, names: Names) -> bool:
    """Whether PEFT kept the pair tied; 0.21 heeds `ensure_weight_tying` for modules of these names alone."""
    last = [str(name).split(".")[-1] for name in (names.embedding, names.head)]
    return bool(adapter.config.get("ensure_weight_tying")) and last == ["embed_tokens", "lm_head"]


def _stored_name(names: Names, parameter: str) -> str:
    """The stored name of a live parameter that is one tensor; its own name when it is new."""
    places = names.parameter(parameter)
    return places[0].tensor if len(places) == 1 else parameter


def _classifier_settings(checkpoint: Checkpoint, sources: Mapping[str, Weight]) -> dict[str, Any]:
    """The class of the merged model and its labels."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    kind = checkpoint.config.get("model_type")
    if kind not in CLASSES:
        raise InputError(
            f"{checkpoint.folder}: transformers has no sequence classifier for model_type {kind!r}",
            "was the adapter trained on another base?",
        )
    settings: dict[str, Any] = {"architectures": [CLASSES[kind]]}
    ends = [f"{head}.weight" for head in CLASSIFIER_HEADS]
    heads = [weight for name, weight in sources.items() if any(f".{name}".endswith(f".{end}") for end in ends)]
    labels = heads[0].spec.shape[0] if heads else None
    if labels is not None and len(checkpoint.config.get("id2label") or ()) != labels:
        settings["id2label"] = {str(index): f"LABEL_{index}" for index in range(labels)}
        settings["label2id"] = {f"LABEL_{index}": index for index in range(labels)}
    return settings


def _vocabulary_settings(names: Names, outputs: Mapping[str, Output], notes: list[str]) -> dict[str, Any]:
    """`vocab_size` where embedding and head were resized; raises InputError when they were not resized alike."""
    changed = [
        (name, output)
        for name, output in outputs.items()
        if (base := names.checkpoint.weights.get(name)) is not None
        and len(base.spec.shape) == 2
        and name.split(".")[-2] not in CLASSIFIER_HEADS
        and output.spec.shape[0] != base.spec.shape[0]
    ]
    if not changed:
        return {}
    rows = {f"{side}.weight": _rows(names, outputs, f"{side}.weight") for side in (names.embedding, names.head) if side}
    counts = {count for count in rows.values() if count is not None}
    if len(counts) > 1:
        described = " and ".join(f"{name} has {count} rows" for name, count in rows.items() if count is not None)
        raise InputError(
            f"{names.checkpoint.folder}: {described}", "save the adapter with save_embedding_layers=True after resizing"
        )
    (count,) = counts
    notes.append(f"the vocabulary was resized in training: {count} rows")
    return {"vocab_size": count}


def _rows(names: Names, outputs: Mapping[str, Output], parameter: str) -> int | None:
    output = outputs.get(_stored_name(names, parameter)) or outputs.get(parameter)
    return output.spec.shape[0] if output else None
