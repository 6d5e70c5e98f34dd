"""What can be made: every format of the catalog in one line, with its size and the runtime that opens it.

The size is measured on the parts that a square weight of 4096 rows becomes; an exporter states its own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from rich.markup import escape
from rich.table import Table

from qlora_export.catalog import ARTIFACTS
from qlora_export.planning.resolve import ResolvedExport, resolve
from qlora_export.recipe.config import ArtifactRecipe
from qlora_export.report.terminal import new_table
from qlora_export.tensors.dtypes import ITEM_BYTES
from qlora_export.types import Part, TensorSpec, TrainingQuantization

SAMPLE = TensorSpec("model.layers.0.mlp.up_proj.weight", "BF16", (4096, 4096))


@dataclass(frozen=True)
class Offer:
    """One format: what it is, bytes for a weight of a linear layer where it stores any, and its runtime."""

    format: str
    kind: str
    what: str
    bytes_per_weight: float | None
    runtime: str


def offers() -> list[Offer]:
    """Every format and exporter of the catalog, in its order."""
    return [_offer(name, info.summary) for name, info in ARTIFACTS.items()]


def offers_data(found: list[Offer]) -> dict[str, Any]:
    """The offers as JSON."""
    return {"schema": 1, "formats": [asdict(offer) for offer in found]}


def offers_table(found: list[Offer]) -> Table:
    """The offers for people."""
    table = new_table("Formats")
    table.add_column("format", no_wrap=True)
    table.add_column("bytes a weight", justify="right")
    table.add_column("runtime", no_wrap=True)
    table.add_column("what it is")
    for offer in found:
        table.add_row(
            offer.format,
            f"{offer.bytes_per_weight:.3g}" if offer.bytes_per_weight else "",
            offer.runtime,
            escape(offer.what),
        )
    return table


def _offer(name: str, summary: str) -> Offer:
    found = resolve(ArtifactRecipe(format=name), TrainingQuantization())
    if isinstance(found, ResolvedExport):
        return Offer(name, "export", summary, found.exporter.bytes_per_weight or None, found.exporter.runtime)
    size = sum(_part_bytes(part) for part in found.form.parts(SAMPLE)) / SAMPLE.size
    return Offer(name, "format", summary, round(size, 3), "transformers")


def _part_bytes(part: Part) -> int:
    return prod(part.shape) * ITEM_BYTES[part.dtype]
