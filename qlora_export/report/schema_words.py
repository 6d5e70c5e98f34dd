"""The words that schemas of what is written are made of; they list every key, and only those that may be missing."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

Schema = dict[str, Any]
DRAFT = "https://json-schema.org/draft/2020-12/schema"
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
MAYBE_NUMBER: Schema = {"type": ["number", "null"]}
MAYBE_TEXT: Schema = {"type": ["string", "null"]}
COUNT: Schema = {"type": "integer", "minimum": 0}
DIGEST: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
TEXTS: Schema = {"type": "array", "items": TEXT}
EXIT_CODE: Schema = {"type": "integer", "minimum": 0, "maximum": 255}


def object_of(keys: Schema, optional: Schema | None = None) -> Schema:
    """An object with exactly these keys, some of which may be missing."""
    return {
        "type": "object",
        "properties": {**keys, **(optional or {})},
        "required": list(keys),
        "additionalProperties": False,
    }


def or_null(schema: Schema) -> Schema:
    """What the schema describes, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def map_of(values: Schema) -> Schema:
    """An object of any keys with such values."""
    return {"type": "object", "additionalProperties": values}


def numbers_of(facts: type) -> Schema:
    """An object of a dataclass's or model's numbers and names; any may be null: not finite, or it does not apply."""
    types = {name: str(item.annotation) for name, item in getattr(facts, "model_fields", {}).items()}
    types = types or {item.name: str(item.type) for item in fields(facts)}
    return object_of({name: MAYBE_TEXT if "str" in kind else MAYBE_NUMBER for name, kind in types.items()})
