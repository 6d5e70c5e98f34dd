from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from qlora_export.catalog import ARTIFACTS
from qlora_export.demo import recipe_path
from qlora_export.report.offers import offers
from qlora_export.report.schemas import SCHEMAS, plan_schema, recipe_schema, report_schema
from tests.cli.inside import inside
from tests.cli.test_cli import recipe, started

__all__ = ["recipe"]


def problems(schema: dict[str, Any], data: Any) -> list[str]:
    found = jsonschema.Draft202012Validator(schema).iter_errors(data)
    return [f"{error.json_path}: {error.message}" for error in found]


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_schemas_are_schemas_and_the_command_prints_them(kind: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[kind]())
    found = (started if kind == "recipe" else inside)("schema", kind)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == SCHEMAS[kind]()


def test_an_unknown_schema_is_exit_2() -> None:
    assert inside("schema", "receipt").returncode == 2


def test_what_the_commands_write_is_what_the_schemas_say(recipe: Path, tmp_path: Path) -> None:
    planned = json.loads(inside("plan", recipe, "--json").stdout)
    assert problems(plan_schema(), planned) == []
    kept = json.loads(inside("plan", recipe, "--json", "-o", tmp_path / "plan.json").stdout)
    assert problems(plan_schema(), kept) == []
    assert problems(plan_schema(), {**kept, "recipe": {"base": "b", "artifacts": ["nf5"]}})
    del kept["pinned"]
    assert problems(plan_schema(), kept), "kept plans hold all of it"
    place = f"publish.to=folder:{tmp_path / 'registry'}"
    found = inside("release", recipe, "--out", tmp_path / "out", "--json", "--set", place)
    assert found.returncode == 0, found.stderr
    data = json.loads(found.stdout)
    assert data["published"]
    assert problems(report_schema(), data) == []
    assert problems(report_schema(), json.loads((tmp_path / "out/report.json").read_text())) == []
    built = json.loads(inside("build", recipe, "--out", tmp_path / "built", "--json").stdout)
    assert problems(report_schema(), built) == []
    data["artifacts"][0]["drift"]["mean_kl"] = "small"
    del data["tokens"]
    assert len(problems(report_schema(), data)) == 2


def test_the_demo_recipe_and_the_short_forms_are_recipes() -> None:
    assert problems(recipe_schema(), yaml.safe_load(recipe_path().read_text())) == []
    short = {"base": "b", "adapter": ["a", {"path": "c", "weight": 0.5}], "artifacts": ["bf16"]}
    assert problems(recipe_schema(), short) == []
    full = {**short, "publish": {"to": "hub:acme/{name}", "as": "pull-request", "card": {"license": "mit"}}}
    assert problems(recipe_schema(), full) == []


@pytest.mark.parametrize(
    "change",
    [
        {"artefacts": []},
        {"artifacts": ["nf5"]},
        {"artifacts": [{"format": "nf5"}]},
        {"artifacts": []},
        {"publish": {"to": "ftp:x"}},
        {"publish": {"to": "folder:x", "mode": "commit"}},
        {"drift": {}},
        {"folder": "x"},
        {"merge": {"onto": "base"}},
    ],
)
def test_what_is_no_recipe_does_not_pass(change: dict[str, Any]) -> None:
    assert problems(recipe_schema(), {"base": "b", "artifacts": ["bf16"], **change})


def test_every_format_of_the_catalog_is_offered() -> None:
    sizes = {offer.format: offer.bytes_per_weight for offer in offers()}
    assert (sizes["bf16"], sizes["fp32"], sizes["adapter"]) == (2, 4, None)
    assert sizes["nf4"] is not None
    assert 0.5 < sizes["nf4"] < 0.57
    found = started("formats")
    assert found.returncode == 0, found.stderr
    assert "[onnx]" in found.stdout
    listed = json.loads(inside("formats", "--json").stdout)["formats"]
    assert [item["format"] for item in listed] == list(ARTIFACTS)
