"""The report as Markdown: `report.md` beside `report.json`, for pull requests and step summaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_export.drift.ledger import Entry, Ledger
from qlora_export.drift.results import Drift
from qlora_export.report.calibration import calibration_lines
from qlora_export.report.layers import layer_table
from qlora_export.report.probes import probe_list
from qlora_export.report.run import Reported
from qlora_export.report.tokens import protocol_line, tokens_data

MARKDOWN_NAME = "report.md"
HEAD = (
    "| model | bytes | perplexity | ratio | mean KL | same top-1 | gain kept | survival | verdict |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---|"
)


LABELS_LEGEND = (
    "Perplexity: of the labels, the exponential of their mean cross-entropy. Same top-1: the same predicted label. "
    "Gain kept has no number: before training the head was new, and said nothing."
)


@dataclass(frozen=True)
class ArtifactRow:
    """One artifact's line in the table."""

    name: str
    bytes: int
    drift: Drift
    verdict: str


def markdown(run: Reported) -> str:
    """The whole report as one Markdown text."""
    facts = run.facts
    lines = [f"# {'Release' if facts.recipe_digest else 'Drift'} report", ""]
    if facts.recipe_digest:
        lines += [f"Recipe `{facts.recipe_digest[:12]}`", ""]
    if run.ledger is None:
        lines += [f"- `{artifact.name}` ({artifact.format}), {artifact.bytes} bytes" for artifact in run.artifacts]
    else:
        lines += [f"Drift from {facts.compared_with}, on {run.ledger.tokens.count} {run.ledger.tokens.unit}.", ""]
        lines += [*_ledger(run.ledger), *probe_list(run.ledger), *layer_table(run.ledger, facts.rounded)]
    lines += _calibrated(run)
    if run.receipts:
        lines += ["", "## Published", ""]
        lines += [f"- `{r.artifact}` to `{r.destination}`, {len(r.files)} files read back" for r in run.receipts]
    if facts.assumptions:
        lines += ["", "## Assumed", "", *(f"- {assumption}" for assumption in facts.assumptions)]
    return "\n".join(lines) + "\n"


def _calibrated(run: Reported) -> list[str]:
    """What was rounded by calibration, and what was not."""
    items = ((artifact.name, calibration_lines(artifact.manifest)) for artifact in run.artifacts)
    lines = [f"- `{name}`: {line}" for name, found in items for line in found]
    return ["", "## Calibration", "", *lines] if lines else []


def write_markdown(run: Reported, folder: Path) -> Path:
    """Write report.md into the run folder, whole or not at all."""
    path = folder / MARKDOWN_NAME
    partial = path.with_suffix(".md.partial")
    partial.write_text(markdown(run), encoding="utf-8")
    partial.rename(path)
    return path


def ledger_table(
    reference: float, base: Drift | None, merged: Drift | None, artifacts: Sequence[ArtifactRow]
) -> list[str]:
    """The ledger as a Markdown table: the reference by its perplexity, what it is compared with, the artifacts.

    A merged model without a base that was measured is a classifier, which has no gain.
    """
    gain = "" if base is None and merged is not None else "100%"
    lines = [HEAD, f"| **reference** | | {reference:.4f} | 1 | 0 | 100% | {gain} | 100% | reference |"]
    rows = (("base alone", base), ("merged, 16 bit", merged))
    lines += [_row(label, "", drift, "") for label, drift in rows if drift is not None]
    return lines + [_row(f"`{row.name}`", str(row.bytes), row.drift, row.verdict) for row in artifacts]


def _ledger(ledger: Ledger) -> list[str]:
    rows = [
        ArtifactRow(entry.artifact.name, entry.artifact.bytes, entry.drift, _verdict(entry)) for entry in ledger.entries
    ]
    lines = ledger_table(ledger.reference.perplexity, ledger.base, ledger.merged, rows)
    lines += ["", f"{protocol_line(tokens_data(ledger.tokens))}; tokens `{ledger.tokens.sha256}`."]
    lines += [LABELS_LEGEND] if ledger.tokens.labels else []
    lines += _steps(ledger)
    reasons = [f"- `{entry.artifact.name}`: {reason}" for entry in ledger.entries for reason in entry.verdict.reasons]
    return [*lines, "", *reasons] if reasons else lines


def _steps(ledger: Ledger) -> list[str]:
    """How far each artifact went on from the merged model, and an export from what it was made of."""
    said = [
        f"- `{entry.artifact.name}` after `{step.artifact}`: perplexity x {math.exp(step.ln_ppl_ratio):.5f} "
        f"± {math.exp(step.ln_ppl_ratio) * step.ln_ppl_ratio_stderr:.1g}, mean KL {step.mean_kl:+.2g}"
        for entry in ledger.entries
        for step in entry.findings.steps
    ]
    return ["", "Step by step:", "", *said] if said else []


def _row(name: str, size: str, drift: Drift, verdict: str) -> str:
    ratio = math.exp(drift.ln_ppl_ratio)
    cells = [
        name,
        size,
        f"{drift.perplexity:.4f}",
        f"{ratio:.4f} ± {ratio * drift.ln_ppl_ratio_stderr:.1g}",
        f"{drift.mean_kl:.2g} ± {drift.mean_kl_stderr:.1g}",
        f"{drift.same_top1:.1%}",
        "" if drift.gain_kept is None else f"{drift.gain_kept:.1%}",
        "" if drift.survival_min is None else f"{drift.survival_min:.1%}",
        verdict,
    ]
    return f"| {' | '.join(cells)} |"


def _verdict(entry: Entry) -> str:
    expected = ", as expected" if entry.as_expected and entry.verdict.outcome == "fail" else ""
    return f"{entry.verdict.outcome}{expected}"
