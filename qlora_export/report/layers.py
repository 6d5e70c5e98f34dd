"""What reports say of single layers: a line about the lowest, a table of the five lowest of each artifact."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from qlora_export.drift.gate import DEFAULT_LIMITS
from qlora_export.drift.layers import KeptLayer, lowest
from qlora_export.drift.ledger import Entry, Ledger

SHOWN = 5
NAME = "lowest survival"
HEAD = (
    "| artifact | layer | survival | codes changed | survival in its outputs | output error |\n"
    "|---|---|---:|---:|---:|---:|"
)


def lowest_line(entry: Entry) -> str | None:
    """The lowest layer in words, where it keeps less than the default limit and the verdict does not name it."""
    if not entry.layers:
        return None
    layer, limit = lowest(entry.layers, 1)[0], DEFAULT_LIMITS.survival_min
    if limit is None or layer.survival >= limit or any(text.startswith(NAME) for text in entry.verdict.reasons):
        return None
    outputs = "" if layer.weighted_survival is None else f", {_weighted(layer)} in its outputs"
    return f"{NAME} is {layer.survival:.4g} in {layer.tensor}{outputs}"


def layer_table(ledger: Ledger, rounded: AbstractSet[str]) -> list[str]:
    """The layers that kept least, of the artifacts of these names, which hold the delta in quantised weights."""
    rows = [
        _row(entry.artifact.name, layer)
        for entry in ledger.entries
        if entry.artifact.name in rounded
        for layer in lowest(entry.layers, SHOWN)
    ]
    return ["", "## Layers that kept least of the delta", "", HEAD, *rows] if rows else []


def _row(artifact: str, layer: KeptLayer) -> str:
    cells: Sequence[str] = (
        f"`{artifact}`",
        f"`{layer.tensor}`",
        f"{layer.survival:.1%}",
        "" if layer.codes_changed is None else f"{layer.codes_changed:.2%}",
        "" if layer.weighted_survival is None else _weighted(layer),
        "" if layer.output_error is None else f"{layer.output_error:.2%}{_when(layer)}",
    )
    return f"| {' | '.join(cells)} |"


def _weighted(layer: KeptLayer) -> str:
    return f"{layer.weighted_survival:.1%}{_when(layer)}"


def _when(layer: KeptLayer) -> str:
    return " before tuning" if layer.weighted_of == "before tuning" else ""
