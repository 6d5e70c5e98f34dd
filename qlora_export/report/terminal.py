"""What a person sees: the result on stdout, progress and hints on stderr, and no bars without a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from rich import box, progress
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qlora_export.drift.ledger import Entry
from qlora_export.drift.results import Drift
from qlora_export.drift.tokens import Unit
from qlora_export.planning.memory import peak_memory_bytes
from qlora_export.report.calibration import calibration_lines
from qlora_export.report.layers import lowest_line
from qlora_export.report.probes import probe_lines
from qlora_export.report.run import Receipt, Reported, Run
from qlora_export.report.tokens import protocol_line, tokens_data
from qlora_export.sources.model_config import is_classifier
from qlora_export.types import Progress

COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}
TABLE_COLUMNS = 112
LEGEND = (
    "ratio: of perplexities, paired, ± standard error · top-1: same most likely token · gain: share of the "
    "fine-tuning gain kept · survival: of the delta, in the worst layer"
)
LABELS_LEGEND = (
    "perplexity: of the labels, exp of their mean cross-entropy · ratio: of perplexities, paired, ± standard error · "
    "top-1: same predicted label · gain: has no number, an untrained head says nothing · survival: of the delta, in "
    "the worst layer"
)


@contextmanager
def show_progress(stage: str) -> Iterator[Progress]:
    """A bar on stderr for one stage, or nothing when stderr is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    columns = (TextColumn("{task.description:<22}"), BarColumn(), TaskProgressColumn(), *times)
    with progress.Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(stage, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def print_plan(run: Run, workers: int) -> None:
    """The plan as a table."""
    console = console_for_result()
    plan = run.plan
    table = new_table(f"{len(plan.model.outputs)} tensors, {len(plan.model.changed)} adapted")
    for name in ("artifact", "format", "merged onto", "rounding"):
        table.add_column(name)
    for name in ("predicted survival", "size"):
        table.add_column(name, justify="right")
    for export in plan.exports:
        made = f"from {export.source_name}"
        table.add_row(export.name, export.exporter.name, made, "", "", f"~{size(export.bytes)}")
    for item in plan.artifacts:
        onto = "its base, adapter beside" if item.form.keeps_adapter else item.onto
        rounding, predicted = item.rounding.chosen or "", item.rounding.predicted
        survival = f"{predicted.median:.0%}" if predicted else ""
        table.add_row(item.name, item.form.name, onto, rounding, survival, size(item.bytes))
    console.print(table)
    console.print(f"disk {size(plan.bytes)}, memory about {size(peak_memory_bytes(plan, workers))}", highlight=False)
    _print_assumptions(console, run)
    _print_warnings(console, run)


def print_artifacts(run: Run) -> None:
    """The folders that were built."""
    console = console_for_result()
    for artifact in run.artifacts:
        state = "verified, kept" if artifact.reused else "built"
        console.print(
            f"{artifact.name:<16} {size(artifact.bytes):>10}  {state:<14}  {artifact.path}",
            highlight=False,
            soft_wrap=True,
        )
    _print_calibration(console, run)
    _print_assumptions(console, run)
    _print_warnings(console, run)


def print_release(run: Run) -> None:
    """The ledger, and where the artifacts went."""
    print_ledger(run)
    print_publication(run)
    if not run.receipts:
        console_for_result().print("nothing was published", highlight=False)


def print_ledger(run: Reported) -> None:
    """The drift of every model from the one that was trained."""
    console, ledger = console_for_result(), run.ledger
    if ledger is None:
        return
    table = new_table(f"Drift from {run.facts.compared_with}")
    table.add_column("model", no_wrap=True)
    for name in ("size", "perplexity", "ratio", "mean KL", "top-1", "gain", "survival"):
        table.add_column(name, justify="right")
    table.add_column("verdict", no_wrap=True)
    gain = "" if ledger.tokens.labels else "100%"
    numbers = (f"{ledger.reference.perplexity:.5g}", "1", "0", "100%", gain, "100%")
    table.add_row(run.facts.reference_name, "", *numbers, "reference", style="bold")
    for label, drift in (("base alone", ledger.base), ("merged, 16 bit", ledger.merged)):
        if drift is not None:
            table.add_row(label, "", *_numbers(drift), "", style="dim")
    for entry in ledger.entries:
        table.add_row(entry.artifact.name, size(entry.artifact.bytes), *_numbers(entry.drift), _verdict(entry))
    console.print(table)
    console.print(f"{ledger.tokens.count} {ledger.tokens.unit}, sha256 {ledger.tokens.sha256[:12]}", highlight=False)
    rules = protocol_line(tokens_data(ledger.tokens))
    console.print(f"{rules}; float32 activations on {ledger.device}", highlight=False, soft_wrap=True)
    console.print(LABELS_LEGEND if ledger.tokens.labels else LEGEND, highlight=False, soft_wrap=True)
    if (noise := ledger.noise) is not None:
        floor = f"mean KL {noise.mean_kl:.2g}, top-1 {noise.same_top1:.1%}, on {noise.tokens} {ledger.tokens.unit}"
        console.print(f"noise floor, the reference against itself in {noise.dtype}: {floor}", highlight=False)
    for entry in ledger.entries:
        for said in (*entry.verdict.reasons, lowest_line(entry), *probe_lines(entry)):
            if said is not None:
                console.print(f"{entry.artifact.name}: {said}", highlight=False, soft_wrap=True)
    _print_calibration(console, run)
    _print_assumptions(console, run)


def print_publication(run: Run) -> None:
    """Where the artifacts went, and what was proven of them."""
    console = console_for_result()
    unit: Unit = "labels" if is_classifier(run.plan.config) else "tokens"
    for receipt in run.receipts:
        console.print(_published(receipt, unit), highlight=False, soft_wrap=True, markup=False)


class _Stdout(Console):
    """A console that leaves a closed pipe to the caller instead of ending the process."""

    def on_broken_pipe(self) -> None:
        """Raise again what rich has caught."""
        raise BrokenPipeError


def console_for_result() -> Console:
    """Stdout; wide enough for the tables, since a number cut short is worse than a line that wraps."""
    return _Stdout(width=max(Console().width, TABLE_COLUMNS))


def new_table(title: str) -> Table:
    """An empty table in the style of all of them."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )


def size(count: int) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000  # type: ignore[assignment]
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"


def _published(receipt: Receipt, unit: Unit) -> str:
    """One line: what went where, as which commit, and what reading it back proved."""
    place = receipt.url or receipt.destination
    line = f"{'published' if receipt.changed else 'already published'} {receipt.artifact} to {place}"
    if receipt.revision is not None:
        transport = "" if receipt.transport == "xet" else "; by classic LFS, without xet"
        line = f"{line} ({receipt.revision}, commit {receipt.commit[:12]}{transport})"
    if (proof := receipt.proof) is None:
        return line
    measured = ""
    if proof.nll is not None and proof.nll_released is not None:
        where = f"nats a {unit[:-1]} over {proof.sample_tokens} {unit}"
        measured = f", {proof.nll:.5f} {where} as released ({proof.nll_released:.5f})"
    return f"{line}\n  proven: {proof.files} files, {size(proof.bytes)} read back{measured}"


def _verdict(entry: Entry) -> str:
    outcome = entry.verdict.outcome
    if not entry.as_expected and entry.recipe.expect == "fail":
        return f"[red]{outcome}, expected to fail[/]"
    if entry.withheld:
        return f"[yellow]{outcome}, withheld[/]"
    if outcome == "fail" and entry.as_expected:
        return "[green]fail, as expected[/]"
    return f"[{COLOURS[outcome]}]{outcome}[/]"


def _numbers(drift: Drift) -> tuple[str, ...]:
    ratio = math.exp(drift.ln_ppl_ratio)
    return (
        f"{drift.perplexity:.5g}",
        f"{ratio:.5g} ± {ratio * drift.ln_ppl_ratio_stderr:.1g}",
        f"{drift.mean_kl:.2g}",
        f"{drift.same_top1:.1%}",
        "" if drift.gain_kept is None else f"{drift.gain_kept:.1%}",
        "" if drift.survival_min is None else f"{drift.survival_min:.1%}",
    )


def _print_calibration(console: Console, run: Reported) -> None:
    for artifact in run.artifacts:
        for line in calibration_lines(artifact.manifest):
            console.print(f"{artifact.name}: {line}", highlight=False, soft_wrap=True)


def _print_warnings(console: Console, run: Run) -> None:
    for warning in run.plan.warnings:
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)


def _print_assumptions(console: Console, run: Reported) -> None:
    for assumption in run.facts.assumptions:
        console.print(f"note: {assumption}", highlight=False, soft_wrap=True)
