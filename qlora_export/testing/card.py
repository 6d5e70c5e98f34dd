"""The Hub's check of a model card: what stands between the two `---` lines of README.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from qlora_export.testing.messages import Answer, Refusal, Request, json_answer
from qlora_export.testing.service import Service

RELATIONS = ("adapter", "finetune", "merge", "quantized")
_LICENCES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0
cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research intel-research isc lgpl
lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by
ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
LICENCES = frozenset(_LICENCES.split())
_MODEL_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}(/[\w][\w.-]{0,95})?")
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def check_card(_service: Service, request: Request) -> Answer:
    """Errors (then 400) and warnings of a card."""
    asked = request.json()
    errors, warnings = card_problems(str(asked.get("content", "")))
    faulty, doubtful = ([{"message": message} for message in messages] for messages in (errors, warnings))
    if errors:
        raise Refusal(400, "Invalid metadata in README.md", errors=faulty, warnings=doubtful)
    return json_answer({"errors": faulty, "warnings": doubtful})


def card_problems(content: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) of a card's text."""
    metadata, broken = front_matter(content)
    if broken:
        return [broken], []
    if not metadata:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return ["YAML metadata must be a mapping"], []
    return [
        *_base_problems(metadata),
        *_licence_problems(metadata),
        *_shape_problems(metadata),
        *_index_problems(metadata),
    ], []


def front_matter(content: str) -> tuple[Any, str | None]:
    """The metadata of a card and what is wrong with its YAML; `None` when there is no metadata."""
    found = _FRONT_MATTER.match(content.removeprefix("\ufeff"))
    if found is None:
        return None, None
    try:
        return yaml.safe_load(found[1]), None
    except yaml.YAMLError as error:
        return None, f"YAML metadata error: {' '.join(str(error).split())}"


def _base_problems(metadata: dict[str, Any]) -> Iterator[str]:
    given = metadata.get("base_model")
    for value in given if isinstance(given, list) else [given] if given is not None else []:
        if not isinstance(value, str) or _MODEL_ID.fullmatch(value) is None:
            yield f'"base_model" with value "{value}" is not valid. Use a model id from https://hf.co/models.'
    relation = metadata.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        yield f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]'


def _licence_problems(metadata: dict[str, Any]) -> Iterator[str]:
    given = metadata.get("license")
    values = given if isinstance(given, list) else [given] if given is not None else []
    for value in values:
        if not isinstance(value, str) or value not in LICENCES:
            yield f'"license" with value "{value}" must be one of [{", ".join(sorted(LICENCES))}]'
    if "other" in values and not metadata.get("license_name"):
        yield '"license_name" is required when "license" is "other"'
    if (name := metadata.get("license_name")) is not None and not re.fullmatch(r"[a-z0-9.-]+", str(name)):
        yield f'"license_name" with value "{name}" must consist of a-z, 0-9, "." and "-"'


def _shape_problems(metadata: dict[str, Any]) -> Iterator[str]:
    for key in ("tags", "datasets", "language"):
        value = metadata.get(key)
        texts = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(text, str) for text in texts):
            yield f'"{key}" must be a string or a list of strings'
    for key in ("library_name", "pipeline_tag"):
        if key in metadata and not isinstance(metadata[key], str):
            yield f'"{key}" must be a string'


def _index_problems(metadata: dict[str, Any]) -> Iterator[str]:
    index = metadata.get("model-index", [])
    if not isinstance(index, list) or not all(isinstance(item, dict) and item.get("name") for item in index):
        yield '"model-index" must be a list of mappings with a "name"'
        return
    for number, item in enumerate(index):
        for place, result in enumerate(item.get("results") or []):
            for key in ("task", "dataset", "metrics"):
                if not isinstance(result, dict) or not result.get(key):
                    yield f'"model-index[{number}].results[{place}].{key}" is required'
