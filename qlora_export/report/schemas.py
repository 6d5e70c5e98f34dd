"""JSON Schemas, draft 2020-12: of the recipe for editors, of report.json and of the plan for whoever reads them.

The recipe's is derived from the model that reads it, with the names of the catalog and the short forms of its lists. In
a report, keys may be added within schema 1 and none change their meaning: readers ignore what they do not know, while
these schemas list everything that this version writes.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args

from qlora_export.catalog import EXPORTERS, FORMATS, PUBLISHERS, RUNTIMES
from qlora_export.contracts import Drift, Proof, Rounding, Sample
from qlora_export.drift.layers import WeightedOf
from qlora_export.recipe import Limits, Recipe

Schema = dict[str, Any]
DRAFT = "https://json-schema.org/draft/2020-12/schema"
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
MAYBE_NUMBER: Schema = {"type": ["number", "null"]}
MAYBE_TEXT: Schema = {"type": ["string", "null"]}
COUNT: Schema = {"type": "integer", "minimum": 0}
DIGEST: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
TEXTS: Schema = {"type": "array", "items": TEXT}
ONTO: Schema = {"enum": ["as-trained", "original"]}
EXIT_CODE: Schema = {"type": "integer", "minimum": 0, "maximum": 255}


def recipe_schema() -> Schema:
    """The schema of a recipe."""
    schema = Recipe.model_json_schema()
    parts, keys = schema["$defs"], schema["properties"]
    formats = sorted({**FORMATS, **EXPORTERS})
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
    keys = {
        "schema": {"const": 1},
        "recipe_digest": DIGEST,
        "tokens": _or_null(_tokens()),
        "reference": _or_null(_reference()),
        "assumptions": TEXTS,
        "artifacts": {"type": "array", "items": _artifact()},
        "published": {"type": "array", "items": _receipt()},
        "exit_code": EXIT_CODE,
    }
    return {"$schema": DRAFT, "title": "A report of qlora-export", **_object(keys)}


def plan_schema() -> Schema:
    """The schema of what `plan --json` prints, and `plan -o` keeps with everything that a release is held to."""
    source = _object({"path": TEXT, "headers_sha256": DIGEST})
    keys = {
        "schema": {"const": 1},
        "recipe_digest": DIGEST,
        "base": source,
        "adapter": _or_null(_object({"path": TEXT, "sha256": DIGEST})),
        "adapted_tensors": COUNT,
        "quantised_in_training": COUNT,
        "assumptions": TEXTS,
        "warnings": TEXTS,
        "bytes": COUNT,
        "peak_memory_bytes": COUNT,
        "artifacts": {"type": "array", "items": _planned_artifact()},
        "exports": {"type": "array", "items": _planned_export()},
    }
    recipe = {key: value for key, value in recipe_schema().items() if key != "$schema"}
    parts = {**recipe.pop("$defs"), "Recipe": recipe}
    kept = {
        "version": TEXT,
        "folder": TEXT,
        "recipe": {"$ref": "#/$defs/Recipe"},
        "pinned": _object(_pins()),
    }
    return {
        "$schema": DRAFT,
        "title": "A plan of qlora-export",
        **_object(keys, kept),
        "dependentRequired": {name: list(kept) for name in kept},
        "$defs": parts,
    }


SCHEMAS = {"recipe": recipe_schema, "report": report_schema, "plan": plan_schema}


def _object(keys: Schema, optional: Schema | None = None) -> Schema:
    """An object with exactly these keys, some of which may be missing."""
    return {
        "type": "object",
        "properties": {**keys, **(optional or {})},
        "required": list(keys),
        "additionalProperties": False,
    }


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _map(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def _numbers_of(facts: type) -> Schema:
    """An object of the dataclass's numbers and names; any may be null, where it was not finite or does not apply."""
    return _object({field.name: MAYBE_TEXT if "str" in str(field.type) else MAYBE_NUMBER for field in fields(facts)})


def _tokens() -> Schema:
    limit = {"type": ["integer", "null"], "minimum": 1}
    return _object({"sha256": DIGEST, "count": COUNT, "protocol": TEXT, "window_tokens": COUNT, "limit": limit})


def _reference() -> Schema:
    drift = _or_null(_numbers_of(Drift))
    return _object(
        {
            "model": TEXT,
            "runtime": TEXT,
            "activations": TEXT,
            "training_quantization": {"enum": ["sidecar", "base", "stated", "assumed", None]},
            "perplexity": MAYBE_NUMBER,
            "perplexity_stderr": MAYBE_NUMBER,
            "base": drift,
            "merged": drift,
        }
    )


def _artifact() -> Schema:
    limits = _object(dict.fromkeys(Limits.model_fields, MAYBE_NUMBER))
    return _object(
        {
            "name": TEXT,
            "format": {"enum": sorted({**FORMATS, **EXPORTERS})},
            "path": TEXT,
            "bytes": COUNT,
            "runtime": {"enum": sorted({*RUNTIMES, "as-trained"})},
            "manifest_sha256": DIGEST,
            "reused": {"type": "boolean"},
            "verdict": {"enum": ["pass", "fail", "inconclusive", "not-measured"]},
            "reasons": TEXTS,
            "drift": _or_null(_numbers_of(Drift)),
        },
        {
            "expected": {"enum": ["pass", "fail"]},
            "limits": limits,
            "survival": _map(NUMBER),
            "layers": {"type": "array", "items": _layer()},
            "sample": _or_null(_numbers_of(Sample)),
        },
    )


def _layer() -> Schema:
    """One adapted matrix of an artifact whose weights could be read back."""
    numbers = dict.fromkeys(("survival", "codes_changed", "weighted_survival", "output_error"), MAYBE_NUMBER)
    return _object({"tensor": TEXT, **numbers, "weighted_of": {"enum": [*get_args(WeightedOf), None]}})


def _receipt() -> Schema:
    return _object(
        {"artifact": TEXT, "destination": TEXT, "commit": TEXT, "files": _map(TEXT)},
        {
            "url": MAYBE_TEXT,
            "revision": MAYBE_TEXT,
            "prefix": TEXT,
            "changed": {"type": "boolean"},
            "transport": {"enum": ["xet", "lfs", None]},
            "proof": _or_null(_numbers_of(Proof)),
        },
    )


def _pins() -> Schema:
    """What a kept plan promises: digests of everything that decides the bytes, the texts included."""
    file = _object({"bytes": COUNT, "sha256": DIGEST})
    return {
        "recipe": DIGEST,
        "base": DIGEST,
        "adapter": _or_null(DIGEST),
        "artifact": _map(DIGEST),
        "text": _or_null(DIGEST),
        "assumptions": TEXTS,
        "base_files": _map(file),
    }


def _planned_artifact() -> Schema:
    return _object(
        {
            "name": TEXT,
            "format": {"enum": sorted(FORMATS)},
            "onto": ONTO,
            "rounding": _or_null(_rounding()),
            "predicted_survival": _or_null(_predicted()),
            "digest": DIGEST,
            "bytes": COUNT,
            "tensors": COUNT,
            "files": _map(COUNT),
        }
    )


def _rounding() -> Schema:
    names = list(get_args(Rounding))
    stated = {"enum": [*names, None]}
    return _object({"stated": stated, "chosen": {"enum": names}, "seed": {"type": ["integer", "null"]}})


def _predicted() -> Schema:
    return _object({"median": NUMBER, "lowest": NUMBER, "lowest_stderr": NUMBER, "lowest_tensor": TEXT})


def _planned_export() -> Schema:
    return _object(
        {
            "name": TEXT,
            "format": {"enum": sorted(EXPORTERS)},
            "source": TEXT,
            "digest": DIGEST,
            "bytes_estimated": COUNT,
        }
    )
