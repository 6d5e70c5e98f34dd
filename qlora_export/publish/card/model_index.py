"""`model-index`: our perplexities as evaluation results, one result for each artifact.

The dataset is a text that is known by the sha256 of its tokens, not by an address: its name says so, and by that name
our results are told from those of people, which stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qlora_export.publish.card.facts import CardFacts, CardItem
from qlora_export.report.tokens import protocol_line, unit_of

DATASET_NAME = "held-out text (sha256 "
DIGITS = 6


def model_index(facts: CardFacts, task: str, before: Any) -> list[dict[str, Any]]:
    """The whole index: what people wrote into it, and our results under the repository's name."""
    models = _of_people(before)
    ours = [_result(facts, item, task) for item in facts.items if facts.report.get("tokens")]
    if not ours:
        return models
    for model in models:
        if model["name"] == facts.name:
            model["results"] += ours
            return models
    return [*models, {"name": facts.name, "results": ours}]


def _of_people(before: Any) -> list[dict[str, Any]]:
    """An index without our results, and without models that had no others."""
    models = []
    for model in before if isinstance(before, list) else []:
        if not isinstance(model, Mapping) or not isinstance(model.get("results"), list) or "name" not in model:
            continue
        theirs = [result for result in model["results"] if not _is_ours(result)]
        if theirs:
            models.append({**model, "results": theirs})
    return models


def _is_ours(result: Any) -> bool:
    dataset = result.get("dataset") if isinstance(result, Mapping) else None
    return isinstance(dataset, Mapping) and str(dataset.get("name", "")).startswith(DATASET_NAME)


def _result(facts: CardFacts, item: CardItem, task: str) -> dict[str, Any]:
    drift, tokens, name = facts.drift(item), facts.report["tokens"], item.artifact.name
    reference = "the model as trained" if item.has_adapter else "the base"
    tokens_known = {
        "protocol": protocol_line(tokens),
        unit_of(tokens): int(tokens["count"]),
        "tokens_sha256": str(tokens["sha256"]),
    }
    here = {"artifact": name, "runtime": item.artifact.runtime, **tokens_known}
    labels = facts.entry(item).get("labels")
    accuracies = (
        ()
        if labels is None
        else (
            ("accuracy", float(labels["accuracy"]), f"Accuracy ({name})", here),
            ("accuracy", float(labels["accuracy_reference"]), f"Accuracy ({reference})", tokens_known),
        )
    )
    measured = (
        *accuracies,
        ("perplexity", drift.perplexity, f"Perplexity ({name})", here),
        ("perplexity", drift.perplexity_reference, f"Perplexity ({reference})", tokens_known),
        ("kl_divergence", drift.mean_kl, f"Mean KL divergence from {reference}, in nats ({name})", here),
    )
    return {
        "task": {"type": task},
        "dataset": {"name": f"{DATASET_NAME}{str(tokens['sha256'])[:12]})", "type": "text"},
        "metrics": [
            {"type": kind, "value": float(f"{value:.{DIGITS}g}"), "name": label, "args": arguments}
            for kind, value, label, arguments in measured
            if math.isfinite(value)
        ],
    }
