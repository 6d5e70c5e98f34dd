"""What storage and a token of every compared artifact cost, and what could not be made."""

from __future__ import annotations

from qlora_export.report.html.figures import significant
from qlora_export.report.html.reading import Facts, number, part, parts
from qlora_export.report.html.section import Section


def costs(comparison: Facts) -> Section | None:
    """The section of what was measured."""
    rows = [row for row in parts(comparison, "rows") if part(row, "drift")]
    adapter = part(comparison, "low_rank")
    spans = {key: _span(part(adapter, key)) for key in ("ranks", "break_even_rank")}
    facts = {"rows": rows, "adapter": adapter, **spans}
    return Section("costs", "Costs", "What storage and one token cost.", "costs.html", facts) if rows else None


def not_made(comparison: Facts) -> Section | None:
    """The section of rows without numbers, each with its reason."""
    rows = [row for row in parts(comparison, "rows") if not part(row, "drift")]
    return Section("not-made", "Not made", "", "not_made.html", {"rows": rows}) if rows else None


def _span(ends: Facts) -> str:
    low, high = number(ends, "min"), number(ends, "max")
    return significant(low) if low == high else f"{significant(low)} to {significant(high)}"
