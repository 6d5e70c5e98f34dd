"""The schemas of what is written: every key is there, none is unknown, and what is spoiled is refused."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from qlora_export.drift.comparison.rows import Comparison
from qlora_export.drift.ledger import Entry
from qlora_export.drift.trace import Broken, LayerError, Trace
from qlora_export.report.comparison import comparison_data
from qlora_export.report.data import plan_summary, report
from qlora_export.report.run import Run
from qlora_export.report.schemas import SCHEMAS
from tests.report.full_report import full_report

# Objects whose keys are names of files, layers, artifacts, reasons or quantiles.
MAPS = {"artifacts", "files", "survival", "fallbacks", "kl_quantiles", "delta_p_quantiles"}
# Keys of an artifact that are left out where there is nothing to say.
MAY_LACK = {
    "calibration", "expected", "limits", "survival", "layers", "sample", "distribution", "beside", "steps", "worst",
    "choices", "labels", "generation", "trace", "onnx",
}  # fmt: skip
Place = tuple[str | int, ...]


def objects(value: Any, place: Place = ()) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Every object with keys of its own, of lists the first item."""
    if isinstance(value, list):
        yield from objects(value[0], (*place, 0)) if value else ()
    elif isinstance(value, dict) and not MAPS.intersection(place[-1:]):
        yield place, value
        for key, item in value.items():
            yield from objects(item, (*place, key))


def at(data: Any, place: Place) -> Any:
    for step in place:
        data = data[step]
    return data


def documents(checked: Run, compared: Comparison) -> dict[str, Any]:
    return {
        "full": ("report", full_report()),
        "report": ("report", report(checked)),
        "plan": ("plan", plan_summary(checked.plan, 2)),
        "compare": ("compare", comparison_data(compared)),
    }


@pytest.mark.parametrize("name", ["full", "report", "plan", "compare"])
def test_a_document_with_a_key_too_many_or_too_few_is_refused(name: str, checked: Run, compared: Comparison) -> None:
    kind, data = documents(checked, compared)[name]
    validator = jsonschema.Draft202012Validator(SCHEMAS[kind]())
    assert validator.is_valid(json.loads(json.dumps(data)))
    found = list(objects(data))
    assert len(found) >= 4
    for place, facts in found:
        spoiled = copy.deepcopy(data)
        at(spoiled, place)["other"] = 1
        assert not validator.is_valid(spoiled), f"{place} takes a key that nobody writes"
        for key in facts:
            spoiled = copy.deepcopy(data)
            del at(spoiled, place)[key]
            may_lack = place == ("artifacts", 0) and kind == "report" and key in MAY_LACK
            assert validator.is_valid(spoiled) == may_lack, f"{place} without {key}"


def entry_with(run: Run, **facts: Any) -> dict[str, Any]:
    """What the report says of the first artifact when this is found."""
    assert run.ledger is not None
    entry = run.ledger.entries[0]
    shown = {name: facts.pop(name) for name in facts.keys() & {field.name for field in fields(entry.findings)}}
    first: Entry = replace(entry, findings=replace(entry.findings, **shown), **facts)
    data = report(replace(run, ledger=replace(run.ledger, entries=(first,))))
    assert jsonschema.Draft202012Validator(SCHEMAS["report"]()).is_valid(json.loads(json.dumps(data)))
    found: dict[str, Any] = data["artifacts"][0]
    return found


def test_numbers_that_are_not_finite_are_null(checked: Run) -> None:
    assert checked.ledger is not None
    drift = replace(checked.ledger.entries[0].drift, perplexity=math.inf, mean_kl=math.nan)
    found = entry_with(checked, drift=drift)["drift"]
    assert found["perplexity"] is found["mean_kl"] is None
    assert found["same_top1"] == drift.same_top1


def test_what_was_not_asked_is_left_out_and_what_has_no_layers_says_so(checked: Run) -> None:
    found = entry_with(checked, trace=None, layers=())
    assert (found["layers"], found["survival"]) == ([], {})
    assert not {"trace", "steps", "beside", "choices"} & {key for key in found if found[key] is None}
    assert "trace" not in found
    assert entry_with(checked, trace=Trace((), note="no layers"))["trace"] == {
        "layers": [], "broken": None, "note": "no layers",
    }  # fmt: skip
    whole = entry_with(checked, trace=Trace((LayerError("a", 0.5),), Broken("a", 0.5, 0.1)))["trace"]
    assert list(whole) == ["layers", "broken"]


def test_an_artifact_that_was_not_measured_has_its_facts_alone(checked: Run) -> None:
    found = report(replace(checked, ledger=None))
    assert found["tokens"] is found["reference"] is None
    assert list(found["artifacts"][0]) == [
        "name", "format", "path", "bytes", "runtime", "manifest_sha256", "reused", "verdict", "reasons", "drift",
    ]  # fmt: skip
    assert found["artifacts"][0]["verdict"] == "not-measured"


@pytest.mark.parametrize(
    ("key", "value"), [("runtime", "excel"), ("bytes", -1), ("verdict", "good"), ("trace", None), ("reused", 1)]
)
def test_other_values_are_refused(key: str, value: Any) -> None:
    data = full_report()
    data["artifacts"][0][key] = value
    assert not jsonschema.Draft202012Validator(SCHEMAS["report"]()).is_valid(data)
