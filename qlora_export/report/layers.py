"""What reports say of single layers: a line about the lowest; of the five lowest `report.md` has a table."""

from __future__ import annotations

from qlora_export.drift.gate import DEFAULT_LIMITS
from qlora_export.drift.layers import lowest
from qlora_export.drift.ledger import Entry

SHOWN = 5
NAME = "lowest survival"


def lowest_line(entry: Entry) -> str | None:
    """The lowest layer in words, where it keeps less than the default limit and the verdict does not name it."""
    if not entry.layers:
        return None
    layer, limit = lowest(entry.layers, 1)[0], DEFAULT_LIMITS.survival_min
    if limit is None or layer.survival >= limit or any(text.startswith(NAME) for text in entry.verdict.reasons):
        return None
    when = " before tuning" if layer.weighted_of == "before tuning" else ""
    outputs = "" if layer.weighted_survival is None else f", {layer.weighted_survival:.1%}{when} in its outputs"
    return f"{NAME} is {layer.survival:.4g} in {layer.tensor}{outputs}"
