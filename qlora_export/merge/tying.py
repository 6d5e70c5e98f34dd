"""From what the adapter changes to the tensors of the merged model: tied pairs, vocabulary, classifier heads.

An output head that is tied to the embedding has no weight of its own. Where training changed one side alone, the live
model was untied, so the merged one is written with both weights and says so in config.json. Trained token rows, copies
that were saved for a resized vocabulary, and adapters with `ensure_weight_tying` change both sides alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_export.errors import InputError
from qlora_export.merge.changes import Change, ReplacedRows
from qlora_export.merge.merged_model import MergedModel, Output
from qlora_export.merge.names import HEAD, Names
from qlora_export.sources.adapter import Adapter
from qlora_export.sources.checkpoint import Checkpoint
from qlora_export.sources.weights import PlainWeight, Weight
from qlora_export.tensors.header import StoredTensor

LiveChanges = Mapping[str, Sequence[Change]]


def settle_model(
    names: Names,
    adapter: Adapter,
    changes: LiveChanges,
    stored_changes: LiveChanges,
    replaced: Mapping[str, StoredTensor],
) -> MergedModel:
    """The merged model, from changes and replacements by the live name of the parameter; raises InputError."""
    live = {name: list(items) for name, items in changes.items()}
    sources: dict[str, Weight] = {name: PlainWeight(tensor) for name, tensor in replaced.items()}
    settings: dict[str, Any] = {}
    notes: list[str] = []
    dropped: dict[str, str] = {}
    added: dict[str, Output] = {}
    head = f"{names.head}.weight" if _touches_vocabulary(names, {*live, *sources}) and names.head else None
    if head is not None and names.tied:
        _settle_tied(names, adapter, head, live, sources, added, settings, notes)
    checkpoint = names.checkpoint
    outputs = {}
    origin = {_stored_name(names, name): name for name in {*live, *sources}}
    for name, weight in checkpoint.weights.items():
        if adapter.classifier and HEAD.search(weight.spec.module):
            dropped[name] = "a classifier has no output head"
            continue
        known = origin.pop(name, "")
        found = [*stored_changes.get(name, ()), *live.get(known, ())]
        outputs[name] = Output(
            name, sources.get(known, weight), tuple(found), name in names.input_major, name in names.carried
        )
    for name in origin.values():
        if name not in added:
            outputs[name] = Output(name, sources[name], tuple(live.get(name, ())))
    outputs.update(added)
    if adapter.classifier:
        settings |= _classifier_settings(checkpoint, sources)
    settings |= _vocabulary_settings(names, outputs, notes)
    return MergedModel(outputs, settings, dropped, tuple(notes))


def _touches_vocabulary(names: Names, touched: set[str]) -> bool:
    """Whether anything but layers between embedding and head is touched; only then their names are asked for."""
    if names.direct and all(".layers." in name or ".h." in name for name in touched):
        return False
    return bool(touched & {f"{names.embedding}.weight", f"{names.head}.weight"})


def _settle_tied(
    names: Names,
    adapter: Adapter,
    head: str,
    live: dict[str, list[Change]],
    sources: dict[str, Weight],
    added: dict[str, Output],
    settings: dict[str, Any],
    notes: list[str],
) -> None:
    """Keep a tied pair tied where both sides changed alike, else untie it."""
    embedding = f"{names.embedding}.weight"
    stored = _stored_name(names, embedding)
    saved = set(adapter.config.get("modules_to_save") or [])
    copied = not any(
        f".{embedding}".endswith(f".{name}.weight") or f".{head}".endswith(f".{name}.weight") for name in saved
    )
    if copied and (embedding in sources or head in sources):
        # PEFT loads a saved copy into the weight that both sides share.
        sources.setdefault(embedding, sources.get(head, sources.get(embedding)))  # type: ignore[arg-type]
        sources.pop(head, None)
    rows_only = all(isinstance(change, ReplacedRows) for change in live.get(embedding, ()))
    one_sided = head in live or head in sources or not rows_only or (embedding in sources and not copied)
    base = sources.get(embedding) or names.checkpoint.weights[stored]
    head_stored = names.parameter(head)
    if not one_sided or _tied_in_training(adapter, names):
        live.pop(head, None)
        sources.pop(head, None)
        if head_stored:
            live[head] = list(live.get(embedding, ()))
            sources[head] = base
        return
    own = sources.get(head) or (base if copied else names.checkpoint.weights[stored])
    if head_stored:
        sources[head] = own
    else:
        added[head] = Output(head, own, tuple(live.pop(head, ())))
        sources.pop(head, None)
    settings["tie_word_embeddings"] = False
    notes.append(
        f"training changed one side of the tied pair {names.embedding} and {names.head}: both are written, untied"
    )


def _tied_in_training(adapter: Adapter, names: Names) -> bool:
    """Whether PEFT kept the pair tied; 0.21 heeds `ensure_weight_tying` for modules of these names alone."""
    last = [str(name).split(".")[-1] for name in (names.embedding, names.head)]
    return bool(adapter.config.get("ensure_weight_tying")) and last == ["embed_tokens", "lm_head"]


def _stored_name(names: Names, parameter: str) -> str:
    """The stored name of a live parameter that is one tensor; its own name when it is new."""
    homes = names.parameter(parameter)
    return homes[0].tensor if len(homes) == 1 else parameter


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
    heads = [weight for name, weight in sources.items() if name.split(".")[-2:] == ["score", "weight"]]
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
