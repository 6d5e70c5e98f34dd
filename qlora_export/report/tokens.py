"""The tokens of a measurement, as data and in a line: no number is told without the rules that it was measured by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from qlora_export.drift.documents import DocumentPerplexity, document_perplexity
from qlora_export.drift.ledger import Ledger
from qlora_export.drift.tokens import TokenSet, Unit
from qlora_export.recipe.protocols import USUAL
from qlora_export.report.schema_words import (
    COUNT,
    DIGEST,
    MAYBE_TEXT,
    TEXT,
    TEXTS,
    Schema,
    map_of,
    numbers_of,
    object_of,
    or_null,
)

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
# Of a classifier alone.
MAYBE_LABELS: Schema = {"labels": TEXTS}

DOCUMENT_SCHEMA: Schema = or_null(
    object_of({"reference": numbers_of(DocumentPerplexity), "artifacts": map_of(numbers_of(DocumentPerplexity))})
)


def tokens_data(tokens: TokenSet) -> dict[str, Any]:
    """What they are and what makes them again from the same text; `protocol` is a sentence, `name` its name."""
    rules = tokens.protocol
    labels = {"labels": list(tokens.labels)} if tokens.labels else {}
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
        **labels,
    }


def unit_of(tokens: Mapping[str, Any]) -> Unit:
    """What a report's `tokens` count: tokens, or the labels of texts."""
    return "labels" if tokens.get("labels") else "tokens"


def document_data(ledger: Ledger | None) -> dict[str, Any] | None:
    """Perplexity by word and by byte of every model, where a protocol scores whole documents."""
    if ledger is None or ledger.tokens.documents is None:
        return None
    documents, count = ledger.tokens.documents, ledger.tokens.count

    def of(perplexity: float) -> dict[str, float]:
        return asdict(document_perplexity(math.log(perplexity), count, documents))

    artifacts = {entry.artifact.name: of(entry.drift.perplexity) for entry in ledger.entries}
    return {"reference": of(ledger.reference.perplexity), "artifacts": artifacts}


def protocol_line(tokens: Mapping[str, Any]) -> str:
    """The protocol of a report's `tokens` by name and in words, with the number of windows where it is told."""
    windows = f" ({int(tokens['windows'])} windows)" if "windows" in tokens else ""
    return f"protocol {tokens.get('name', USUAL)}: {tokens['protocol']}{windows}"
