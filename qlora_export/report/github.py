"""What a step of GitHub Actions leaves behind: its outputs, its summary, and errors beside the log.

    $GITHUB_OUTPUT          name=value, a line each
    $GITHUB_STEP_SUMMARY    Markdown; over 1024 KiB GitHub drops all of it, so it is cut well below
    ::error title=T::M      at most ten are shown for a step

GitLab takes the same outputs as a dotenv report; see `dotenv`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_export.errors import ExitCode
from qlora_export.report.recorded import error_text

SUMMARY_BYTES = 900 * 1024
MOST_ERRORS = 10
CUT = "\n\n**Cut here: the whole report is in report.md of the run folder.**\n"
CONTROL = re.compile("[\x00-\x1f\x7f\u0085\u2028\u2029]+")
ANNOUNCED = ("commit_oid", "repo_url", "mean_kl", "manifest_sha256", "report", "published")


def step_summary(markdown: str) -> str:
    """The Markdown, cut at the end of a line with a note where it would be more than 900 KiB."""
    raw = markdown.encode(errors="replace")
    if len(raw) <= SUMMARY_BYTES:
        return markdown
    head = raw[: SUMMARY_BYTES - len(CUT.encode())]
    whole_lines = head[: head.rfind(b"\n") + 1] or head
    return whole_lines.decode(errors="ignore") + CUT


def outputs(data: Mapping[str, Any], report: Path | None = None) -> dict[str, str]:
    """What later steps ask for, empty where there is nothing to say; `report` is where report.json lies.

    `commit_oid`, `repo_url` and `manifest_sha256` are those of the first publication, `published` is all of them as a
    JSON list. `mean_kl` is the worst of what was published, or else of what may be.
    """
    receipts = list(data.get("published", ()))
    artifacts = {artifact["name"]: artifact for artifact in data.get("artifacts", ())}
    passed = [name for name, artifact in artifacts.items() if artifact["verdict"] == "pass"]
    shown = [receipt["artifact"] for receipt in receipts] or passed
    first = receipts[0] if receipts else {}
    found = {
        "commit_oid": first.get("commit"),
        "repo_url": first.get("url"),
        "mean_kl": _worst_kl([artifacts[name] for name in shown if name in artifacts]),
        "manifest_sha256": artifacts.get(shown[0], {}).get("manifest_sha256") if shown else None,
        "report": report,
        "published": json.dumps([_publication(receipt) for receipt in receipts]),
    }
    return {name: CONTROL.sub(" ", "" if value is None else str(value)) for name, value in found.items()}


def _publication(receipt: Mapping[str, Any]) -> dict[str, Any]:
    return {key: receipt.get(key) for key in ("artifact", "destination", "commit", "url", "revision")}


def _worst_kl(artifacts: list[Mapping[str, Any]]) -> float | None:
    numbers = [artifact["drift"]["mean_kl"] for artifact in artifacts if artifact.get("drift")]
    return max((number for number in numbers if number is not None), default=None)


def error_lines(data: Mapping[str, Any]) -> list[str]:
    """Workflow commands for what went wrong, ten at most; a verdict that the recipe expects is not wrong."""
    code = int(data.get("exit_code", 0))
    found: list[tuple[str, str]] = []
    if (error := data.get("error")) is not None:
        found.append((f"exit code {code}", error_text(error)))
    if code != ExitCode.OK:
        for artifact in data.get("artifacts", ()):
            if artifact["verdict"] not in ("not-measured", artifact.get("expected", "pass")):
                reasons = artifact["reasons"] or [f"the verdict is {artifact['verdict']}, expected to fail"]
                found += [(f"{artifact['name']}: {artifact['verdict']}", reason) for reason in reasons]
    more = len(found) - MOST_ERRORS
    if more > 0:
        found = [*found[: MOST_ERRORS - 1], (f"{more + 1} more", "they are in report.md of the run folder")]
    return [f"::error title={_property(title)}::{_message(text)}" for title, text in found]


def announce(
    data: Mapping[str, Any], markdown: str, report: Path | None = None, environment: Mapping[str, str] = os.environ
) -> list[str]:
    """Append summary and outputs where the environment asks for them; answers the lines to print on stderr."""
    if path := environment.get("GITHUB_STEP_SUMMARY"):
        _append(Path(path), step_summary(markdown))
    values = outputs(data, report)
    if path := environment.get("GITHUB_OUTPUT"):
        _append(Path(path), "".join(f"{name}={value}\n" for name, value in values.items()))
    if path := environment.get("QLORA_EXPORT_DOTENV"):
        Path(path).write_text(dotenv(values), encoding="utf-8")
    return error_lines(data) if environment.get("GITHUB_ACTIONS") == "true" else []


def dotenv(values: Mapping[str, str]) -> str:
    """The outputs as GitLab's dotenv report, QLORA_EXPORT_COMMIT_OID and so on; what is empty is left out."""
    return "".join(
        f"QLORA_EXPORT_{name.upper()}={values[name]}\n"
        for name in ANNOUNCED
        if values.get(name) and name != "published"
    )


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8", errors="replace") as file:
        file.write(text)


def _message(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")
