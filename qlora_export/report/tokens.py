"""The tokens of a measurement, as data and in a line: no number is told without the rules that it was measured by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from qlora_export.drift.documents import document_perplexity
from qlora_export.drift.ledger import Ledger
from qlora_export.drift.tokens import TokenSet, Unit
from qlora_export.recipe.protocols import USUAL
from qlora_export.report.documents import Tokens


def tokens_data(tokens: TokenSet) -> dict[str, Any]:
    """What they are and what makes them again from the same text."""
    return Tokens.model_validate(tokens).data()


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
