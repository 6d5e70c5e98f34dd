"""The quality benchmark's rows: what one holds, the figures that follow from them, and how they are printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PEER = "llm-compressor w4a16"
PLAIN = ("nf4 nearest", "nf4 nearest, original")
SMALLEST_KL = 1e-5


@dataclass(frozen=True)
class Row:
    """One artifact: what it takes, what it cost, how far it is from what was trained.

    `same_bytes_as` names an earlier row with the very weights: a rounding that changed nothing, and counts for nothing.
    """

    bytes: int
    bits_per_weight: float
    seconds: float
    mean_kl: float
    mean_kl_stderr: float
    perplexity_ratio: float
    gain_kept: float | None
    same_top1: float
    survival_min: float | None
    survival_median: float | None
    same_bytes_as: str | None = None


@dataclass(frozen=True)
class Table:
    """The rows of one model, the errors of those that do not exist, and what all were measured on."""

    tokens: int
    tokens_sha256: str
    rows: dict[str, Row]
    refused: dict[str, str]


def to_better_plain(rows: Mapping[str, Row], row: str) -> float | None:
    """Mean KL of a row over that of the better plain rounding."""
    if row not in rows or not set(PLAIN) <= set(rows):
        return None
    plain = min(rows[name].mean_kl for name in PLAIN)
    return max(rows[row].mean_kl, SMALLEST_KL) / max(plain, SMALLEST_KL)


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is there."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def ratios_of(tables: Mapping[str, Table], sweeps: Mapping[str, Mapping[str, Table]]) -> dict[str, float | None]:
    """The figures that are compared with the goals, means over the models."""
    every = [
        {label: row for label, row in table.rows.items() if row.same_bytes_as is None} for table in tables.values()
    ]

    def kl(rows: Mapping[str, Row], row: str) -> float | None:
        return rows[row].mean_kl if row in rows else None

    def to_peer(rows: Mapping[str, Row]) -> float | None:
        mine, theirs = kl(rows, "w4a16 calibrated"), kl(rows, PEER)
        return mine / theirs if mine is not None and theirs else None

    ratios = {
        "nf4_calibrated_to_better_plain": mean([to_better_plain(rows, "nf4 calibrated") for rows in every]),
        "nf4_tuned_to_better_plain": mean([to_better_plain(rows, "nf4 tuned") for rows in every]),
        "nf4_dithered_to_better_plain": mean([to_better_plain(rows, "nf4 dithered") for rows in every]),
        "gain_kept_calibrated": mean(
            [rows[row].gain_kept for rows in every for row in rows if row == "nf4 calibrated"]
        ),
        "w4a16_calibrated_to_llm_compressor": mean([to_peer(rows) for rows in every]),
        "nf4_adapter_kl": mean([kl(rows, "nf4-adapter") for rows in every]),
        "int8_kl": mean([kl(rows, "int8") for rows in every]),
        "w8a16_kl": mean([kl(rows, "w8a16") for rows in every]),
    }
    points = [table.rows for part in sweeps.values() for table in part.values()]
    swept = [ratio for rows in points if (ratio := to_better_plain(rows, "nf4 dithered")) is not None]
    return ratios | ({"nf4_dithered_to_better_plain_worst": max(swept)} if swept else {})


def print_table(name: str, table: Table) -> None:
    """One model's rows for people."""
    print(f"\n{name}: {table.tokens} tokens")
    print(
        f"{'':<24}{'MB':>7}{'bits':>7}{'mean KL':>11}{'+-':>10}{'ratio':>8}{'gain':>8}{'top-1':>8}"
        f"{'survival':>15}{'s':>7}"
    )
    for label, row in table.rows.items():
        gain = "" if row.gain_kept is None else f"{row.gain_kept:.2%}"
        kept = "" if row.survival_min is None else f"{row.survival_min:.2f} / {row.survival_median:.2f}"
        print(
            f"{label:<24}{row.bytes / 1e6:7.2f}{row.bits_per_weight:7.3f}{row.mean_kl:11.6f}{row.mean_kl_stderr:10.6f}"
            f"{row.perplexity_ratio:8.4f}{gain:>8}{row.same_top1:8.2%}{kept:>15}{row.seconds:7.1f}"
            + (f"  the bytes of {row.same_bytes_as}" if row.same_bytes_as else "")
        )
    for label, refusal in table.refused.items():
        print(f"{label:<24}refused: {refusal}")
