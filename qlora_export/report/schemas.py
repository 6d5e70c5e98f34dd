"""JSON Schemas, draft 2020-12: of the recipe for editors, of report.json and of the plan for whoever reads them.

The recipe's is derived from the model that reads it, with the names of the catalog and the short forms of its lists. In
a report, keys may be added within schema 1 and none change their meaning: readers ignore what they do not know, while
these schemas list everything that this version writes.
"""

from __future__ import annotations

from typing import get_args

from qlora_export.catalog import EXPORTERS, FORMATS, PUBLISHERS, RUNTIMES
from qlora_export.drift.layers import WeightedOf
from qlora_export.drift.results import Drift, Sample
from qlora_export.recipe.config import AUTO, Recipe
from qlora_export.report.comparison_schema import compare_schema
from qlora_export.report.findings import findings_schema, limits_schema, noise_schema
from qlora_export.report.run import Proof
from qlora_export.report.schema_words import (
    COUNT,
    DIGEST,
    DRAFT,
    EXIT_CODE,
    MAYBE_NUMBER,
    MAYBE_TEXT,
    NUMBER,
    TEXT,
    TEXTS,
    Schema,
    map_of,
    numbers_of,
    object_of,
    or_null,
)
from qlora_export.report.tokens import DOCUMENT_SCHEMA, MAYBE_COUNT, MAYBE_LABELS, TOKENS_SCHEMA
from qlora_export.types import Rounding

ONTO: Schema = {"enum": ["as-trained", "original"]}


def recipe_schema() -> Schema:
    """The schema of a recipe."""
    schema = Recipe.model_json_schema()
    parts, keys = schema["$defs"], schema["properties"]
    formats = sorted({**FORMATS, **EXPORTERS, AUTO: ""})
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
        "recipe_digest": or_null(DIGEST),
        "tokens": or_null(_tokens()),
        "reference": or_null(_reference()),
        "document_perplexity": DOCUMENT_SCHEMA,
        "assumptions": TEXTS,
        "artifacts": {"type": "array", "items": _artifact()},
        "published": {"type": "array", "items": _receipt()},
        "exit_code": EXIT_CODE,
    }
    return {"$schema": DRAFT, "title": "A report of qlora-export", **object_of(keys)}


def plan_schema() -> Schema:
    """The schema of what `plan --json` prints, and `plan -o` keeps with everything that a release is held to."""
    source = object_of({"path": TEXT, "headers_sha256": DIGEST})
    keys = {
        "schema": {"const": 1},
        "recipe_digest": DIGEST,
        "base": source,
        "adapter": or_null(object_of({"path": TEXT, "sha256": DIGEST})),
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
        "pinned": object_of(_pins()),
    }
    return {
        "$schema": DRAFT,
        "title": "A plan of qlora-export",
        **object_of(keys, kept),
        "dependentRequired": {name: list(kept) for name in kept},
        "$defs": parts,
    }


SCHEMAS = {"recipe": recipe_schema, "report": report_schema, "plan": plan_schema, "compare": compare_schema}


def _tokens() -> Schema:
    return object_of({**TOKENS_SCHEMA, "limit": MAYBE_COUNT}, MAYBE_LABELS)


def _reference() -> Schema:
    drift = or_null(numbers_of(Drift))
    return object_of(
        {
            "model": TEXT,
            "runtime": TEXT,
            "activations": TEXT,
            "training_quantization": {"enum": ["sidecar", "base", "stated", "assumed", None]},
            "perplexity": MAYBE_NUMBER,
            "perplexity_stderr": MAYBE_NUMBER,
            "base": drift,
            "merged": drift,
        },
        {"noise_floor": noise_schema(), "device": TEXT},
    )


def _artifact() -> Schema:
    return object_of(
        {
            "name": TEXT,
            "format": TEXT,
            "path": TEXT,
            "bytes": COUNT,
            "runtime": {"enum": sorted({*RUNTIMES, "as-trained"})},
            "manifest_sha256": or_null(DIGEST),
            "reused": {"type": "boolean"},
            "verdict": {"enum": ["pass", "fail", "inconclusive", "not-measured"]},
            "reasons": TEXTS,
            "drift": or_null(numbers_of(Drift)),
        },
        {
            "expected": {"enum": ["pass", "fail"]},
            "calibration": _calibration(),
            "limits": limits_schema(),
            "survival": map_of(NUMBER),
            "layers": {"type": "array", "items": _layer()},
            "sample": or_null(numbers_of(Sample)),
            **findings_schema(),
        },
    )


def _calibration() -> Schema:
    """The tokens that rounding looked at, the layers, and how many were left to the format, by reason."""
    counts = {"sequences": COUNT, "tokens": COUNT, "tokens_sha256": DIGEST, "layers": COUNT}
    return object_of({**counts, "fallbacks": map_of(COUNT), "notes": TEXTS})


def _layer() -> Schema:
    """One adapted matrix of an artifact whose weights could be read back."""
    numbers = dict.fromkeys(("survival", "codes_changed", "weighted_survival", "output_error"), MAYBE_NUMBER)
    return object_of({"tensor": TEXT, **numbers, "weighted_of": {"enum": [*get_args(WeightedOf), None]}})


def _receipt() -> Schema:
    return object_of(
        {"artifact": TEXT, "destination": TEXT, "commit": TEXT, "files": map_of(TEXT)},
        {
            "url": MAYBE_TEXT,
            "revision": MAYBE_TEXT,
            "prefix": TEXT,
            "changed": {"type": "boolean"},
            "transport": {"enum": ["xet", "lfs", None]},
            "proof": or_null(numbers_of(Proof)),
        },
    )


def _pins() -> Schema:
    """What a kept plan promises: digests of everything that decides the bytes, the texts included."""
    file = object_of({"bytes": COUNT, "sha256": DIGEST})
    return {
        "recipe": DIGEST,
        "base": DIGEST,
        "adapter": or_null(DIGEST),
        "artifact": map_of(DIGEST),
        "text": or_null(DIGEST),
        "assumptions": TEXTS,
        "base_files": map_of(file),
    }


def _planned_artifact() -> Schema:
    return object_of(
        {
            "name": TEXT,
            "format": {"enum": sorted(FORMATS)},
            "onto": ONTO,
            "rounding": or_null(_rounding()),
            "predicted_survival": or_null(_predicted()),
            "digest": DIGEST,
            "bytes": COUNT,
            "tensors": COUNT,
            "files": map_of(COUNT),
        }
    )


def _rounding() -> Schema:
    names = list(get_args(Rounding))
    stated = {"enum": [*names, None]}
    return object_of({"stated": stated, "chosen": {"enum": names}, "seed": {"type": ["integer", "null"]}})


def _predicted() -> Schema:
    return object_of({"median": NUMBER, "lowest": NUMBER, "lowest_stderr": NUMBER, "lowest_tensor": TEXT})


def _planned_export() -> Schema:
    return object_of(
        {
            "name": TEXT,
            "format": {"enum": sorted(EXPORTERS)},
            "source": TEXT,
            "digest": DIGEST,
            "bytes_estimated": COUNT,
        }
    )
