"""JSON Schemas, draft 2020-12: of the recipe for editors, of report.json and of the plan for whoever reads them.

Each is derived from the model that reads or writes it; the recipe's has the names of the catalog and the short forms of
its lists.
"""

from __future__ import annotations

from typing import Any

from qlora_export.catalog import ARTIFACTS, PUBLISHERS
from qlora_export.recipe.config import AUTO, Recipe
from qlora_export.report.documents import DRAFT, ComparisonReport, PlanSummary, Report

Schema = dict[str, Any]


def recipe_schema() -> Schema:
    """The schema of a recipe."""
    schema = Recipe.model_json_schema()
    parts, keys = schema["$defs"], schema["properties"]
    formats = sorted([*ARTIFACTS, AUTO])
    parts["ArtifactRecipe"]["properties"]["format"] = {
        "enum": formats,
        "description": "What to make; see `qlora-export formats`.",
    }
    kinds = "|".join(PUBLISHERS)
    parts["PublishRecipe"]["properties"]["to"]["pattern"] = f"^({kinds}):."
    keys["artifacts"]["items"] = {"anyOf": [{"$ref": "#/$defs/ArtifactRecipe"}, {"enum": formats}]}
    named: Schema = {"type": "string", "minLength": 1}
    several = {"anyOf": [{"$ref": "#/$defs/WeightedAdapter"}, named]}
    keys["adapter"] = {"anyOf": [named, {"type": "array", "minItems": 1, "items": several}]}
    parts["CalibrationRecipe"]["oneOf"] = [{"required": ["text"]}, {"required": ["mixture"]}]
    mixture = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/CalibrationPart"}}
    keys["calibration"]["anyOf"].append(mixture)
    # Where paths start is the file's own folder, and no key.
    del keys["folder"]
    return {"$schema": DRAFT, **schema, "title": "A recipe of qlora-export"}


def report_schema() -> Schema:
    """The schema of report.json, and of what release, check and build print with `--json` when they end well."""
    return Report.written_schema("A report of qlora-export")


def plan_schema() -> Schema:
    """The schema of what `plan --json` prints, and `plan -o` keeps with everything that a release is held to."""
    schema, recipe = PlanSummary.written_schema("A plan of qlora-export"), recipe_schema()
    del recipe["$schema"]
    schema["$defs"] |= {**recipe.pop("$defs"), "Recipe": recipe}
    schema["properties"]["recipe"] = {"$ref": "#/$defs/Recipe"}
    return schema


def compare_schema() -> Schema:
    """The schema of what `compare --json` prints."""
    return ComparisonReport.written_schema("A comparison of qlora-export")


SCHEMAS = {"recipe": recipe_schema, "report": report_schema, "plan": plan_schema, "compare": compare_schema}
