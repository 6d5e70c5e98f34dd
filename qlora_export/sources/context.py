"""How many tokens a model was made to read at once, as config.json states it under one of several names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEYS = ("n_positions", "max_position_embeddings", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")


def context_tokens(text_config: Mapping[str, Any]) -> int | None:
    """The context in tokens; None where the part of config.json on the language model does not state it."""
    for key in KEYS:
        stated = text_config.get(key)
        if isinstance(stated, int) and stated > 0:
            return stated
    return None
