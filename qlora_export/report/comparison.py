"""A comparison as JSON, as CSV and as tables."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace as Facts
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qlora_export.drift.comparison.costs import LowRankCost, Span
from qlora_export.drift.comparison.pareto import front, points, recommend
from qlora_export.drift.comparison.rows import Comparison, Measured, Row
from qlora_export.drift.results import Drift
from qlora_export.report.documents import ComparedRow, ComparisonReport
from qlora_export.report.terminal import COLOURS, console_for_result, new_table, size
from qlora_export.report.tokens import protocol_line, tokens_data

LEGEND = (
    "bits: stored for a linear weight, with scales and a kept adapter · FLOPs, bytes read: of one token, against the "
    "merged model in float32 · prefill, decode: speed against fp32 in the check's runtime on this machine (float32 "
    "activations, weights of bitsandbytes decoded in every call): a ratio of least times; a busy machine moves it"
)


def comparison_data(found: Comparison) -> dict[str, Any]:
    """The comparison as plain data, schema 1; numbers that are not finite become null."""
    choice = recommend(found)
    rows = [_row(row, found) for row in found.rows]
    chosen = {"front": front(points(found)), "recommended": choice.name, "why": choice.why}
    facts = Facts(**{**vars(found), **chosen, "reference": found, "fp32": found, "rows": rows})
    return ComparisonReport.model_validate(facts).data()


def _row(row: Row, found: Comparison) -> ComparedRow:
    """One row with its shares of what fp32 takes."""
    told, cost = ComparedRow.model_validate(row), found.fp32_cost
    shares = {
        "bytes_of_fp32": _share(told.bytes, found.fp32_bytes),
        "flops_of_fp32": _share(told.flops_per_token, cost.flops_per_token),
        "bytes_per_token_of_fp32": _share(told.bytes_per_token, cost.bytes_per_token),
    }
    return told.model_copy(update=shares)


def _share(part: int | None, whole: int) -> float | None:
    return None if part is None else part / whole


def write_comparison_csv(found: Comparison, path: Path) -> None:
    """One line a row, the numbers of its drift as columns of their own."""
    drift_names = [field.name for field in fields(Drift)]
    names = [key for key in ComparedRow.model_fields if key not in ("drift", "reason", "reasons")] + drift_names
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*names, "reason"], extrasaction="ignore")
        writer.writeheader()
        for row in comparison_data(found)["rows"]:
            reason = row["reason"] or "; ".join(row["reasons"] or ())
            writer.writerow({**row, **(row["drift"] or {}), "reason": reason})


def print_comparison(found: Comparison) -> None:
    """The comparison for people."""
    console = console_for_result()
    console.print(_drift_table(found))
    console.print(_cost_table(found))
    for line in (LEGEND, f"{found.tokens.count} {found.tokens.unit}, {protocol_line(tokens_data(found.tokens))}"):
        console.print(line, highlight=False, soft_wrap=True)
    if found.low_rank is not None:
        _print_low_rank(console, found.low_rank, found)
    for row in found.rows:
        if row.reason is not None:
            console.print(f"{row.name}: not made: {row.reason}", highlight=False, soft_wrap=True, markup=False)
    choice = recommend(found)
    taken = f"take {choice.name}: the smallest that" if choice.name else "no artifact"
    console.print(f"[bold]{escape(taken)} keeps the recipe's limits[/]", highlight=False)
    for line in choice.why:
        console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
    for note in found.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)


def _drift_table(found: Comparison) -> Table:
    """Size and drift, the smallest first; on the front of both are marked."""
    table = new_table("Size and drift from the model that was trained")
    table.add_column("artifact", no_wrap=True)
    for name in ("size", "bits", "perplexity", "mean KL", "gain", "top-1", "survival"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    best = front(points(found))
    for row in found.rows:
        if row.measured is not None:
            mark = "*" if row.name in best else " "
            table.add_row(f"{mark} {row.name}", *_drift_cells(row.measured))
    reference = found.reference
    perplexity = f"{reference.perplexity:.4g} ± {reference.perplexity_stderr:.1g}"
    gain = "" if found.tokens.labels else "100%"
    table.add_row("  as trained", "", "", perplexity, "0", gain, "100%", "100%", "reference", style="bold")
    table.caption, table.caption_justify = "* nothing smaller drifts less", "left"
    return table


def _drift_cells(measured: Measured) -> tuple[str, ...]:
    drift, verdict = measured.entry.drift, measured.entry.verdict.outcome
    return (
        size(measured.bytes),
        f"{measured.cost.bits_per_weight:.3g}" if measured.cost else "",
        f"{drift.perplexity:.4g} ± {drift.perplexity_stderr:.1g}",
        f"{drift.mean_kl:.2g} ± {drift.mean_kl_stderr:.1g}",
        "" if drift.gain_kept is None else f"{drift.gain_kept:.1%}",
        f"{drift.same_top1:.1%}",
        "" if drift.survival_min is None else f"{drift.survival_min:.1%}",
        f"[{COLOURS[verdict]}]{verdict}[/]",
    )


def _cost_table(found: Comparison) -> Table:
    table = new_table("What storage and a token cost")
    table.add_column("artifact", no_wrap=True)
    for name in ("size of fp32", "arithmetic", "FLOPs", "of fp32", "bytes read", "of fp32", "prefill", "decode"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.rows:
        if row.measured is None:
            continue
        cost = row.measured.cost
        counted = ("", "", "", "", "")
        if cost is not None:
            counted = (
                cost.arithmetic,
                _count(cost.flops_per_token),
                f"{cost.flops_per_token / found.fp32_cost.flops_per_token:.1%}",
                size(cost.bytes_per_token),
                f"{cost.bytes_per_token / found.fp32_cost.bytes_per_token:.1%}",
            )
        stored = f"{row.measured.bytes / found.fp32_bytes:.1%}"
        table.add_row(row.name, stored, *counted, _times(row.measured.prefill_ratio), _times(row.measured.decode_ratio))
    return table


def _print_low_rank(console: Console, found: LowRankCost, comparison: Comparison) -> None:
    """The adapter's arithmetic in sentences."""
    share = found.factored_parameters / found.full_parameters
    more = found.flops_per_token / comparison.fp32_cost.flops_per_token
    ranks, even = _span(found.ranks, str), _span(found.break_even_rank, lambda rank: f"{rank:.0f}")
    held = f"{found.factored_parameters:,} parameters in factors for {found.full_parameters:,}"
    kept = f"{found.bits_per_weight:.3g} bits a weight ({size(found.bytes)})"
    lines = (
        f"adapter: rank {ranks}, {held} in {found.matrices} matrices ({share:.2%}); fewer below rank {even}",
        f"kept beside, it adds {kept} and {_count(found.flops_per_token)} FLOPs a token ({more:.2%}); merged, nothing",
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _span(ends: Span, show: Callable[[Any], str]) -> str:
    first, last = show(ends.min), show(ends.max)
    return first if first == last else f"{first} to {last}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None or not math.isfinite(ratio) else f"{ratio:.2f} x"


def _count(number: int) -> str:
    """A number of operations for people."""
    for power, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {unit}"
    return str(number)
