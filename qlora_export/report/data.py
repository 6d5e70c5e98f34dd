"""The report as JSON, schema 1: what `--json` prints and `report.json` holds, and the exit code that follows."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace as Facts
from typing import Any

from qlora_export.errors import ExitCode
from qlora_export.planning.memory import peak_memory_bytes
from qlora_export.planning.plan import Plan
from qlora_export.report.documents import PlanSummary, Report
from qlora_export.report.html.page import write_page
from qlora_export.report.markdown import write_markdown
from qlora_export.report.run import Reported
from qlora_export.report.templating import write_whole
from qlora_export.report.tokens import document_data, tokens_data

REPORT_NAME = "report.json"


def exit_code(run: Reported) -> ExitCode:
    """OK when every verdict is the expected one, or the artifact is withheld and another passed."""
    if run.failure is not None:
        return run.failure
    entries = run.ledger.entries if run.ledger else ()
    if any(entry.withheld for entry in entries) and not any(entry.verified for entry in entries):
        return ExitCode.GATE_FAILED
    surprises = [entry for entry in entries if not entry.as_expected and not entry.withheld]
    if any(entry.verdict.outcome != "inconclusive" for entry in surprises):
        return ExitCode.GATE_FAILED
    return ExitCode.GATE_INCONCLUSIVE if surprises else ExitCode.OK


def report(run: Reported) -> dict[str, Any]:
    """The report of a run as plain data; numbers that are not finite become null."""
    entries = {entry.artifact.name: entry for entry in (run.ledger.entries if run.ledger else ())}
    document = {
        "recipe_digest": run.facts.recipe_digest,
        "tokens": _tokens(run),
        "reference": run if run.ledger else None,
        "document_perplexity": document_data(run.ledger),
        "assumptions": run.facts.assumptions,
        "artifacts": [Facts(artifact=item, entry=entries.get(item.name)) for item in run.artifacts],
        "published": run.receipts,
        "exit_code": exit_code(run),
    }
    return Report.model_validate(document).data()


def publication(run: Reported) -> dict[str, Any]:
    """What was published, as plain data."""
    return {"schema": 1, "published": [asdict(receipt) for receipt in run.receipts], "exit_code": 0}


def plan_summary(plan: Plan, workers: int) -> dict[str, Any]:
    """The plan as JSON."""
    facts = Facts(plan=plan, peak_memory_bytes=peak_memory_bytes(plan, workers))
    return PlanSummary.model_validate(facts).data()


def write_report(run: Reported, folder: Path) -> Path:
    """Write report.json, and report.md and report.html beside it, into the run folder; each whole or not at all."""
    data = report(run)
    path = write_whole(json.dumps(data, indent=2) + "\n", folder / REPORT_NAME)
    write_markdown(run, folder)
    write_page(data, folder)
    return path


def _tokens(run: Reported) -> dict[str, Any] | None:
    """The tokens of the ledger, and what makes them again from the same text."""
    if run.ledger is None or run.facts.drift is None:
        return None
    return {**tokens_data(run.ledger.tokens), "limit": run.facts.drift.tokens}
