"""A comparison as JSON, as CSV and as tables."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qlora_export.drift.comparison.costs import LowRankCost
from qlora_export.drift.comparison.pareto import front, points, recommend
from qlora_export.drift.comparison.rows import Comparison, Measured, Row
from qlora_export.drift.results import Drift
from qlora_export.report.data import finite
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
    tokens, reference = found.tokens, found.reference
    data = {
        "schema": 1,
        "recipe_digest": found.recipe_digest,
        "tokens": tokens_data(tokens),
        "reference": {
            "perplexity": reference.perplexity,
            "perplexity_stderr": reference.perplexity_stderr,
            "base": asdict(found.base) if found.base else None,
            "merged": asdict(found.merged) if found.merged else None,
        },
        "limits": found.limits.model_dump(),
        "linear_weights": found.weights,
        "fp32": {
            "bytes": found.fp32_bytes,
            "flops_per_token": found.fp32_cost.flops_per_token,
            "bytes_per_token": found.fp32_cost.bytes_per_token,
        },
        "low_rank": _low_rank_data(found.low_rank),
        "rows": [row_data(row, found) for row in found.rows],
        "front": front(points(found)),
        "recommended": choice.name,
        "why": list(choice.why),
        "notes": list(found.notes),
        "exit_code": 0,
    }
    cleaned: dict[str, Any] = finite(data)
    return cleaned


def row_data(row: Row, found: Comparison) -> dict[str, Any]:
    """One row as plain data; what is not known is None."""
    facts: dict[str, Any] = {"name": row.name, "format": row.candidate.format, "reason": row.reason}
    measured = row.measured
    if measured is None:
        return facts | dict.fromkeys(MEASURED_KEYS)
    cost, entry = measured.cost, measured.entry
    values = (
        measured.rounding, measured.onto, entry.runtime, measured.bytes, measured.bytes / found.fp32_bytes,
        cost and cost.weight_bytes, cost and cost.bits_per_weight, cost and cost.arithmetic,
        cost and cost.flops_per_token, cost and cost.flops_per_token / found.fp32_cost.flops_per_token,
        cost and cost.bytes_per_token, cost and cost.bytes_per_token / found.fp32_cost.bytes_per_token,
        measured.speed.prefill, measured.prefill_ratio, measured.speed.decode, measured.decode_ratio,
        entry.verdict.outcome, list(entry.verdict.reasons), asdict(entry.drift),
    )  # fmt: skip
    return facts | dict(zip(MEASURED_KEYS, values, strict=True))


MEASURED_KEYS = (
    "rounding", "onto", "runtime", "bytes", "bytes_of_fp32",
    "weight_bytes", "bits_per_weight", "arithmetic", "flops_per_token", "flops_of_fp32",
    "bytes_per_token", "bytes_per_token_of_fp32",
    "prefill_tokens_per_second", "prefill_of_fp32", "decode_tokens_per_second", "decode_of_fp32",
    "verdict", "reasons", "drift",
)  # fmt: skip


def write_comparison_csv(found: Comparison, path: Path) -> None:
    """One line a row, the numbers of its drift as columns of their own."""
    drift_names = [field.name for field in fields(Drift)]
    names = ["name", "format", *(key for key in MEASURED_KEYS if key not in ("drift", "reasons")), *drift_names]
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


def _low_rank_data(found: LowRankCost | None) -> dict[str, Any] | None:
    if found is None:
        return None
    facts = asdict(found)
    for key in ("ranks", "break_even_rank"):
        low, high = facts.pop(key)
        facts[key] = {"min": low, "max": high}
    return facts


def _span(ends: tuple[Any, Any], show: Callable[[Any], str]) -> str:
    first, last = (show(end) for end in ends)
    return first if first == last else f"{first} to {last}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None or not math.isfinite(ratio) else f"{ratio:.2f} x"


def _count(number: int) -> str:
    """A number of operations for people."""
    for power, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {unit}"
    return str(number)
