"""What storage and a token of every compared artifact cost, and what could not be made."""

from __future__ import annotations

from qlora_export.report.html.elements import Child, Markup, code, element, joined
from qlora_export.report.html.figures import DASH, share, significant
from qlora_export.report.html.reading import Facts, number, part, parts, text
from qlora_export.report.html.section import Section, name_of
from qlora_export.report.html.table import Cell, Column, described, table

COLUMNS = (
    Column("artifact"),
    Column("size of fp32", numeric=True),
    Column("bits a weight", numeric=True),
    Column("arithmetic"),
    Column("FLOPs of fp32", numeric=True),
    Column("bytes read of fp32", numeric=True),
    Column("prefill", numeric=True, note="of fp32"),
    Column("decode", numeric=True, note="of fp32"),
)
NOTE = (
    "Bits are those stored for a linear weight, with scales and a kept adapter. FLOPs and bytes read are of one token. "
    "Prefill and decode are speeds in the check's runtime on the machine of the comparison, as ratios of least times; "
    "a busy machine moves them, and engines with kernels for a format are faster."
)


def costs(comparison: Facts) -> Section | None:
    """The section of what was measured."""
    rows = [_row(row) for row in parts(comparison, "rows") if part(row, "drift")]
    if not rows:
        return None
    body = joined(
        table("Cost of every artifact against float32", COLUMNS, rows, sortable=True),
        element("p", NOTE, class_="said"),
        _adapter(part(comparison, "low_rank")),
    )
    return Section("costs", "Costs", "What storage and one token cost.", body)


def not_made(comparison: Facts) -> Section | None:
    """The section of rows without numbers, each with its reason."""
    found = [row for row in parts(comparison, "rows") if not part(row, "drift")]
    if not found:
        return None
    columns = (Column("artifact"), Column("reason", wide=True))
    rows = [(code(name_of(row)), text(row, "reason")) for row in found]
    return Section("not-made", "Not made", "", table("What could not be made, and why", columns, rows))


def _row(row: Facts) -> list[Cell | Child]:
    bits, prefill, decode = (number(row, key) for key in ("bits_per_weight", "prefill_of_fp32", "decode_of_fp32"))
    stored, flops, read = (number(row, key) for key in ("bytes_of_fp32", "flops_of_fp32", "bytes_per_token_of_fp32"))
    return [
        code(name_of(row)),
        Cell(share(stored), stored),
        Cell(significant(bits), bits),
        text(row, "arithmetic") or DASH,
        Cell(share(flops), flops),
        Cell(share(read), read),
        Cell(_times(prefill), prefill),
        Cell(_times(decode), decode),
    ]


def _times(ratio: float | None) -> str:
    return DASH if ratio is None else f"{ratio:.2f}\u00d7"


def _adapter(found: Facts) -> Markup | None:
    """What keeping the adapter beside the weights costs."""
    if not found:
        return None
    bits, flops = number(found, "bits_per_weight"), number(found, "flops_per_token")
    pairs: list[tuple[str, Child]] = [
        ("rank", _span(part(found, "ranks"))),
        ("fewer numbers than the matrices below rank", _span(part(found, "break_even_rank"))),
        ("kept beside, it adds", f"{significant(bits)} bits a weight, {significant(flops)} FLOPs a token"),
    ]
    return joined(element("h3", "The adapter", class_="aside"), described(pairs))


def _span(ends: Facts) -> str:
    low, high = number(ends, "min"), number(ends, "max")
    return significant(low) if low == high else f"{significant(low)} to {significant(high)}"
