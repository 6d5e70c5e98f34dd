"""The tokens of a measurement, as data and in a line: no number is told without the rules that it was measured by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from qlora_export.drift.tokens import TokenSet
from qlora_export.protocol_names import USUAL
from qlora_export.report.schema_words import COUNT, DIGEST, MAYBE_TEXT, TEXT, Schema, object_of, or_null

MAYBE_COUNT: Schema = {"type": ["integer", "null"], "minimum": 1}
TOKENS_SCHEMA: Schema = {
    "sha256": DIGEST,
    "count": COUNT,
    "windows": COUNT,
    "name": TEXT,
    "protocol": TEXT,
    "window_tokens": COUNT,
    "stride_tokens": MAYBE_COUNT,
    "begin": MAYBE_TEXT,
    "documents": or_null(object_of({"count": COUNT, "words": COUNT, "bytes": COUNT})),
}


def tokens_data(tokens: TokenSet) -> dict[str, Any]:
    """What they are and what makes them again from the same text; `protocol` is a sentence, `name` its name."""
    rules = tokens.protocol
    return {
        "sha256": tokens.sha256,
        "count": tokens.count,
        "windows": len(tokens.windows),
        "name": rules.name,
        "protocol": rules.sentence,
        "window_tokens": rules.window_tokens,
        "stride_tokens": rules.stride_tokens,
        "begin": rules.begin,
        "documents": asdict(tokens.documents) if tokens.documents else None,
    }


def protocol_line(tokens: Mapping[str, Any]) -> str:
    """The protocol of a report's `tokens` by name and in words, with the number of windows where it is told."""
    windows = f" ({int(tokens['windows'])} windows)" if "windows" in tokens else ""
    return f"protocol {tokens.get('name', USUAL)}: {tokens['protocol']}{windows}"
