"""The report as JSON, schema 1: what `--json` prints and `report.json` holds, and the exit code that follows."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_export.artifact import Artifact
from qlora_export.drift.ledger import Entry
from qlora_export.errors import ExitCode
from qlora_export.planning.memory import peak_memory_bytes
from qlora_export.planning.plan import Plan
from qlora_export.planning.survival_estimate import Predicted
from qlora_export.report.calibration import calibration_of
from qlora_export.report.findings import findings_of
from qlora_export.report.html.page import write_page
from qlora_export.report.markdown import write_markdown
from qlora_export.report.run import Reported
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
    data = {
        "schema": 1,
        "recipe_digest": run.facts.recipe_digest,
        "tokens": _tokens(run),
        "reference": _reference(run),
        "document_perplexity": document_data(run.ledger),
        "assumptions": list(run.facts.assumptions),
        "artifacts": [_artifact(artifact, entries.get(artifact.name)) for artifact in run.artifacts],
        "published": [asdict(receipt) for receipt in run.receipts],
        "exit_code": int(exit_code(run)),
    }
    cleaned: dict[str, Any] = finite(data)
    return cleaned


def publication(run: Reported) -> dict[str, Any]:
    """What was published, as plain data."""
    return {"schema": 1, "published": [asdict(receipt) for receipt in run.receipts], "exit_code": 0}


def plan_summary(plan: Plan, workers: int) -> dict[str, Any]:
    """The plan as JSON."""
    return {
        "schema": 1,
        "recipe_digest": plan.recipe.digest,
        "base": {"path": str(plan.checkpoint.folder), "headers_sha256": plan.checkpoint.headers_sha256},
        "adapter": {"path": str(plan.adapter.folder), "sha256": plan.adapter.sha256} if plan.adapter else None,
        "adapted_tensors": len(plan.model.changed),
        "quantised_in_training": len(plan.training.quantised),
        "assumptions": list(plan.assumptions),
        "warnings": list(plan.warnings),
        "bytes": plan.bytes,
        "peak_memory_bytes": peak_memory_bytes(plan, workers),
        "artifacts": [
            {
                "name": artifact.name,
                "format": artifact.form.name,
                "onto": artifact.onto,
                "rounding": artifact.rounding.facts,
                "predicted_survival": _predicted(artifact.rounding.predicted),
                "digest": artifact.digest,
                "bytes": artifact.bytes,
                "tensors": len(artifact.routes),
                "files": {
                    **{shard.file: shard.bytes for shard in artifact.layout.shards},
                    **{file.name: file.bytes for file in artifact.carried},
                },
            }
            for artifact in plan.artifacts
        ],
        "exports": [
            {
                "name": export.name,
                "format": export.exporter.name,
                "source": export.source_name,
                "digest": export.digest,
                "bytes_estimated": export.bytes,
            }
            for export in plan.exports
        ],
    }


def _predicted(found: Predicted | None) -> dict[str, Any] | None:
    if found is None:
        return None
    name = found.lowest
    lowest = {"lowest": found.survival[name], "lowest_stderr": found.stderr[name], "lowest_tensor": name}
    return {"median": found.median, **lowest}


def write_report(run: Reported, folder: Path) -> Path:
    """Write report.json, and report.md and report.html beside it, into the run folder; each whole or not at all."""
    path, data = folder / REPORT_NAME, report(run)
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    partial.rename(path)
    write_markdown(run, folder)
    write_page(data, folder)
    return path


def _tokens(run: Reported) -> dict[str, Any] | None:
    """The tokens of the ledger, and what makes them again from the same text."""
    if run.ledger is None or run.facts.drift is None:
        return None
    return {**tokens_data(run.ledger.tokens), "limit": run.facts.drift.tokens}


def _reference(run: Reported) -> dict[str, Any] | None:
    if run.ledger is None:
        return None
    return {
        "model": run.facts.reference,
        "runtime": "transformers",
        "activations": "float32",
        "training_quantization": run.facts.training,
        "perplexity": run.ledger.reference.perplexity,
        "perplexity_stderr": run.ledger.reference.perplexity_stderr,
        "base": asdict(run.ledger.base) if run.ledger.base else None,
        "merged": asdict(run.ledger.merged) if run.ledger.merged else None,
        "noise_floor": asdict(run.ledger.noise) if run.ledger.noise else None,
        "device": run.ledger.device,
    }


def _artifact(artifact: Artifact, entry: Entry | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": artifact.name,
        "format": artifact.format,
        "path": str(artifact.path),
        "bytes": artifact.bytes,
        "runtime": str(artifact.manifest["runtime"]),
        "manifest_sha256": artifact.manifest_sha256 or None,
        "reused": artifact.reused,
    }
    if (calibration := calibration_of(artifact.manifest)) is not None:
        facts["calibration"] = calibration
    if entry is None:
        return {**facts, "verdict": "not-measured", "reasons": [], "drift": None}
    return {
        **facts,
        "verdict": entry.verdict.outcome,
        "expected": entry.recipe.expect,
        "reasons": list(entry.verdict.reasons),
        "limits": entry.limits.model_dump(),
        "drift": asdict(entry.drift),
        "survival": dict(entry.survival),
        "layers": [asdict(layer) for layer in entry.layers],
        "sample": asdict(entry.sample),
        **findings_of(entry),
    }


def finite(value: Any) -> Any:
    """The value with None for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
