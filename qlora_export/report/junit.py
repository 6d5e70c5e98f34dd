"""The report as JUnit XML, which GitHub, GitLab and Jenkins show: one test case per artifact and limit.

A number beyond its limit is a failure whose message is the number against the limit; one that the recipe expects, or an
artifact that is withheld, is skipped with its reason. What stopped the run is an error of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal
from xml.etree import ElementTree

from qlora_export.drift.gate import Check, checks
from qlora_export.drift.results import MAY_LACK, Drift
from qlora_export.drift.statistics import Beside
from qlora_export.errors import ExitCode
from qlora_export.recipe.config import Limits
from qlora_export.report.recorded import error_text
from qlora_export.report.tokens import unit_of

SUITE = "qlora-export"
# What XML 1.0 cannot hold, not even escaped.
NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
DRIFT_NUMBERS = tuple(field.name for field in fields(Drift))


@dataclass(frozen=True)
class Case:
    """One test case: what it belongs to, its name, how it went, and why."""

    group: str
    name: str
    outcome: Literal["passed", "failure", "error", "skipped"] = "passed"
    message: str = ""
    kind: str = ""


def junit(data: Mapping[str, Any]) -> str:
    """The report, or the object that an error prints with `--json`, as a JUnit document."""
    cases = list(_cases(data))
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.outcome == "failure" for case in cases)),
        "errors": str(sum(case.outcome == "error" for case in cases)),
        "skipped": str(sum(case.outcome == "skipped" for case in cases)),
    }
    root = ElementTree.Element("testsuites", {"name": SUITE, **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": SUITE, **counts})
    for case in cases:
        _write(suite, case)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _write(suite: ElementTree.Element, case: Case) -> None:
    place = {"classname": f"{SUITE}.{_clean(case.group)}", "name": _clean(case.name)}
    element = ElementTree.SubElement(suite, "testcase", place)
    if case.outcome == "passed":
        return
    message = _clean(case.message)
    told = {"message": message, "type": case.kind} if case.kind else {"message": message}
    ElementTree.SubElement(element, case.outcome, told).text = None if case.outcome == "skipped" else message


def _clean(text: str) -> str:
    return NOT_IN_XML.sub("", text)


def _cases(data: Mapping[str, Any]) -> Iterator[Case]:
    scored = data.get("tokens") or {}
    code = data.get("exit_code", 0)
    for artifact in data.get("artifacts", ()):
        yield from _of_artifact(artifact, scored, withheld=code == ExitCode.OK)
    for receipt in data.get("published", ()):
        yield Case("publication", str(receipt["artifact"]))
    if (error := data.get("error")) is not None:
        yield Case("run", "finished", "error", error_text(error), _name(code))
    elif code not in (ExitCode.OK, ExitCode.GATE_FAILED, ExitCode.GATE_INCONCLUSIVE):
        yield Case("run", "finished", "error", f"the run ended with exit code {code}, {_name(code)}", _name(code))


def _of_artifact(artifact: Mapping[str, Any], scored: Mapping[str, Any], withheld: bool) -> Iterator[Case]:
    name, verdict = str(artifact["name"]), artifact["verdict"]
    if verdict == "not-measured":
        yield Case(name, "verdict", "skipped", "built, not measured")
        return
    expected = artifact.get("expected", "pass")
    found = [_of_check(name, check, scored) for check in _checks(artifact)]
    said = {case.message for case in found}
    if unsaid := [reason for reason in artifact["reasons"] if reason not in said]:
        found.append(Case(name, "verdict", "failure", "\n".join(unsaid), verdict))
    if verdict == expected:
        yield from (_excused(case, "as the recipe expects") for case in found)
    elif withheld:
        yield from (_excused(case, "withheld") for case in found)
    else:
        yield from found
        if expected == "fail":
            yield Case(name, "expected", "failure", f"the verdict is {verdict}, the recipe expects it to fail", verdict)


def _checks(artifact: Mapping[str, Any]) -> list[Check]:
    """Every number of the artifact that has a limit; none when one was not finite."""
    drift = {key: artifact["drift"].get(key) for key in DRIFT_NUMBERS}
    if any(value is None for key, value in drift.items() if key not in MAY_LACK):
        return []
    further = Beside(**artifact["beside"]) if artifact.get("beside") else None
    return checks(Drift(**drift), Limits(**artifact["limits"]), further)


def _of_check(group: str, check: Check, scored: Mapping[str, Any]) -> Case:
    if check.outcome == "pass":
        return Case(group, check.name)
    return Case(group, check.name, "failure", check.reason(scored.get("count", 0), unit_of(scored)), check.outcome)


def _excused(case: Case, why: str) -> Case:
    if case.outcome == "passed":
        return case
    return Case(case.group, case.name, "skipped", f"{why}: {case.message}")


def _name(code: int) -> str:
    known = {int(item): item.name.lower().replace("_", "-") for item in ExitCode}
    return known.get(code, str(code))
