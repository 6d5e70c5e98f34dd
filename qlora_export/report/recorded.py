"""Reading a report back: what an earlier run measured of its artifacts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_export.drift.results import Sample
from qlora_export.errors import InputError


def recorded_sample(report: Mapping[str, Any], artifact: str) -> Sample | None:
    """The sample that a report holds for an artifact; None where it was not measured."""
    entry = recorded_entry(report, artifact)
    return Sample(**entry["sample"]) if entry and entry.get("sample") else None


def recorded_entry(report: Mapping[str, Any], artifact: str) -> Mapping[str, Any] | None:
    """What a report says of an artifact."""
    entries: Iterable[Mapping[str, Any]] = report.get("artifacts", ())
    return next((entry for entry in entries if entry.get("name") == artifact), None)


def error_text(error: Mapping[str, Any]) -> str:
    """What stopped a run as its report holds it, the hint on a line of its own."""
    return f"{error['message']}\nhint: {error['hint']}" if error.get("hint") else str(error["message"])


def read_report(path: Path) -> dict[str, Any]:
    """A report of ours; raises InputError when it is not there or no report."""
    try:
        report = json.loads(path.read_bytes())
        if report["schema"] != 1 or not isinstance(report["artifacts"], list):
            raise KeyError("schema")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no report", "run check first, or release") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: no report of this version", "run check again") from None
    found: dict[str, Any] = report
    return found
