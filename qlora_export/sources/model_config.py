"""What config.json says of a model: whether it is a sequence classifier, what its labels are called, its context."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_export.errors import InputError, Refused

CLASSIFIER = "ForSequenceClassification"
# What transformers takes where config.json names none.
UNSTATED = ("LABEL_0", "LABEL_1")
MULTI_LABEL = "multi_label_classification"
CONTEXT_KEYS = ("n_positions", "max_position_embeddings", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether config.json names the class of a sequence classifier."""
    stated = config.get("architectures")
    return isinstance(stated, list) and bool(stated) and str(stated[0]).endswith(CLASSIFIER)


def holds_classifier(folder: Path) -> bool:
    """Whether a folder's config.json names such a class; a damaged one does not."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and is_classifier(config)


def label_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the labels by number; raises Refused where a text does not have exactly one of several."""
    stated = config.get("id2label")
    if not isinstance(stated, Mapping) or not stated:
        return UNSTATED
    names = {str(number): str(name) for number, name in stated.items()}
    try:
        found = tuple(names[str(number)] for number in range(len(names)))
    except KeyError as error:
        raise InputError(
            f"config.json: id2label names {len(names)} labels and has no {error.args[0]}", "number them from 0"
        ) from None
    if len(found) == 1 or config.get("problem_type") == MULTI_LABEL:
        kind = "one label is a regression" if len(found) == 1 else "several labels a text have no distribution"
        raise Refused(f"config.json: {kind}, whose drift is not measured", "use build, it merges it")
    return found


def context_tokens(text_config: Mapping[str, Any]) -> int | None:
    """The context in tokens; None where the part of config.json on the language model does not state it."""
    for key in CONTEXT_KEYS:
        stated = text_config.get(key)
        if isinstance(stated, int) and stated > 0:
            return stated
    return None
