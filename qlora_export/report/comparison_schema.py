"""The JSON Schema of a comparison, which `compare --json` prints."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

from qlora_export.catalog import EXPORTERS, FORMATS, RUNTIMES
from qlora_export.drift.comparison.costs import Arithmetic, LowRankCost
from qlora_export.drift.results import Drift
from qlora_export.report.comparison import MEASURED_KEYS
from qlora_export.report.findings import limits_schema
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
    numbers_of,
    object_of,
    or_null,
)
from qlora_export.report.tokens import MAYBE_LABELS, TOKENS_SCHEMA
from qlora_export.types import Onto, Rounding


def compare_schema() -> Schema:
    """The schema of what `compare --json` prints."""
    drift = or_null(numbers_of(Drift))
    reference = {"perplexity": MAYBE_NUMBER, "perplexity_stderr": MAYBE_NUMBER, "base": drift, "merged": drift}
    keys = {
        "schema": {"const": 1},
        "recipe_digest": DIGEST,
        "tokens": object_of(TOKENS_SCHEMA, MAYBE_LABELS),
        "reference": object_of(reference),
        "limits": limits_schema(),
        "linear_weights": COUNT,
        "fp32": object_of({"bytes": COUNT, "flops_per_token": COUNT, "bytes_per_token": COUNT}),
        "low_rank": or_null(_low_rank()),
        "rows": {"type": "array", "items": _compared()},
        "front": TEXTS,
        "recommended": MAYBE_TEXT,
        "why": TEXTS,
        "notes": TEXTS,
        "exit_code": EXIT_CODE,
    }
    return {"$schema": DRAFT, "title": "A comparison of qlora-export", **object_of(keys)}


def _compared() -> Schema:
    """A row; one that could not be made has a reason, and null for everything that would have been measured."""
    stated = {"name": TEXT, "format": {"enum": sorted({**FORMATS, **EXPORTERS})}, "reason": MAYBE_TEXT}
    words = {
        "rounding": {"enum": [*get_args(Rounding), None]},
        "onto": {"enum": [*get_args(Onto), None]},
        "runtime": {"enum": [*sorted({*RUNTIMES, "as-trained"}), None]},
        "arithmetic": {"enum": [*get_args(Arithmetic), None]},
        "verdict": {"enum": ["pass", "fail", "inconclusive", None]},
        "reasons": or_null(TEXTS),
        "drift": or_null(numbers_of(Drift)),
    }
    return object_of({**stated, **{key: words.get(key, MAYBE_NUMBER) for key in MEASURED_KEYS}})


def _low_rank() -> Schema:
    span = object_of({"min": NUMBER, "max": NUMBER})
    spans = {"ranks": span, "break_even_rank": span}
    return object_of({field.name: spans.get(field.name, NUMBER) for field in fields(LowRankCost)})
