"""The front matter's keys that are ours, and their values.

`base_model_relation`: dense weights with the adapter merged are a `finetune`, 4-bit ones `quantized`, the adapter alone
an `adapter`; of several artifacts the first that is no ONNX decides. Dense weights without any adapter are the base in
another file, for which the Hub has no word: then the key is left as it is. Tags and evaluation results of people stay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qlora_export.errors import UsageError
from qlora_export.publish.card.facts import CardFacts
from qlora_export.publish.card.model_index import model_index
from qlora_export.publish.card.snippets import JAVASCRIPT_LAYOUT, loads_in_javascript

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
TOOL_TAG = "qlora-export"


def metadata(facts: CardFacts, before: Mapping[Any, Any]) -> dict[str, Any]:
    """Every managed key with its value; raises UsageError for a base that is no Hub id or a licence without a name."""
    if not HUB_ID.fullmatch(facts.base_id):
        raise UsageError(
            f"{facts.base_id!r} is no Hub id, and a model card names its base by one", "add base_id: OWNER/NAME"
        )
    stated: dict[str, Any] = {
        "base_model": _unless_listed(facts.base_id, before.get("base_model")),
        "base_model_relation": _relation(facts),
        "library_name": facts.main.info.library,
        "pipeline_tag": _task(facts),
        **_license(facts, before),
        "datasets": list(facts.settings.datasets),
        "language": list(facts.settings.language),
        "tags": _tags(facts, before.get("tags")),
        "model-index": model_index(facts, _task(facts), before.get("model-index")),
    }
    return {key: value for key, value in stated.items() if value not in (None, [])}


def dropped_keys(facts: CardFacts, before: Mapping[Any, Any]) -> tuple[str, ...]:
    """Name and link of a licence that is no longer the one of this model."""
    if before.get("license") in (None, facts.license):
        return ()
    named = {"license_name": facts.settings.license_name, "license_link": facts.settings.license_link}
    return tuple(key for key, value in named.items() if value is None)


def _relation(facts: CardFacts) -> str | None:
    item = facts.main
    if not item.has_adapter and item.info.base_model_relation == "finetune":
        return None
    return item.info.base_model_relation


def _task(facts: CardFacts) -> str:
    return "text-classification" if facts.main.is_classifier else "text-generation"


def _license(facts: CardFacts, before: Mapping[Any, Any]) -> dict[str, Any]:
    settings = facts.settings
    kept = before.get("license_name") if before.get("license") == facts.license else None
    if facts.license == "other" and not (settings.license_name or kept):
        raise UsageError(
            "the licence is 'other', and the Hub wants its name",
            "add publish.card.license_name and license_link, a file or an address",
        )
    return {
        "license": facts.license,
        "license_name": settings.license_name,
        "license_link": settings.license_link,
    }


def _unless_listed(base_id: str, before: Any) -> Any:
    """The id, or the list of one that people made of it."""
    return before if before == [base_id] else base_id


def _tags(facts: CardFacts, before: Any) -> list[Any]:
    """People's tags, then those of the recipe and of the formats that are not among them."""
    theirs = before if isinstance(before, list) else [before] if before else []
    script = [JAVASCRIPT_LAYOUT] if any(loads_in_javascript(item) for item in facts.items) else []
    ours = [TOOL_TAG, *(tag for item in facts.items for tag in item.info.tags), *script, *_training_tag(facts)]
    return list(theirs) + [tag for tag in dict.fromkeys((*facts.settings.tags, *ours)) if tag not in theirs]


def _training_tag(facts: CardFacts) -> tuple[str, ...]:
    training = facts.main.manifest.get("training_quantization") or {}
    return ("qlora",) if training.get("quant_type") in ("nf4", "fp4") else ()
