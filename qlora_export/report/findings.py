"""What a check found beside the means, as plain data and its schema: the spread over tokens, and where it is worst.

Texts in it are those that drift was measured on; what is published is without them.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from qlora_export.drift.distribution import Bucket, Distribution
from qlora_export.drift.generation import Continuation, Generation
from qlora_export.drift.ledger import Entry, Noise
from qlora_export.drift.multiple_choice import Choices, Flip
from qlora_export.drift.onnx.variants import Distance, GraphFindings
from qlora_export.drift.statistics import Beside
from qlora_export.drift.trace import Broken, LayerError, Trace
from qlora_export.drift.worst_tokens import WorstToken, WorstWindow
from qlora_export.recipe.config import Limits, Yardstick
from qlora_export.report.schema_words import (
    COUNT,
    MAYBE_NUMBER,
    NUMBER,
    TEXT,
    TEXTS,
    Schema,
    map_of,
    numbers_of,
    object_of,
    or_null,
)


def findings_of(entry: Entry) -> dict[str, Any]:
    """The findings on one artifact, those that were made."""
    found: dict[str, Any] = {"distribution": _distribution(entry.distribution)}
    if entry.beside is not None:
        found["beside"] = asdict(entry.beside)
    if entry.steps:
        found["steps"] = [asdict(step) for step in entry.steps]
    if entry.worst is not None:
        found["worst"] = asdict(entry.worst)
    if entry.choices is not None:
        found["choices"] = asdict(entry.choices)
    if entry.labels is not None:
        found["labels"] = asdict(entry.labels)
    if entry.generation is not None:
        found["generation"] = asdict(entry.generation)
    if entry.trace is not None:
        found["trace"] = _trace(entry.trace)
    if entry.onnx is not None:
        found["onnx"] = asdict(entry.onnx)
    return found


def findings_schema() -> Schema:
    """Their keys, any of which may be missing."""
    worst = {"tokens": _list(numbers_of(WorstToken)), "windows": _list(numbers_of(WorstWindow))}
    return {
        "distribution": _distribution_schema(),
        "beside": numbers_of(Beside),
        "steps": _list(numbers_of(Beside)),
        "worst": object_of(worst),
        "choices": _with_list(numbers_of(Choices), "flipped", Flip),
        "labels": _with_list(numbers_of(Choices), "flipped", Flip),
        "generation": _with_list(numbers_of(Generation), "worst", Continuation),
        "trace": _trace_schema(),
        "onnx": _onnx_schema(),
    }


def limits_schema() -> Schema:
    """The limits that a number is judged by; null where it is not."""
    numbers = {name: MAYBE_NUMBER for name in Limits.model_fields if name != "no_worse_than"}
    return object_of({**numbers, "no_worse_than": or_null(numbers_of(Yardstick))})


def noise_schema() -> Schema:
    """The reference against itself in another dtype."""
    return or_null(numbers_of(Noise))


def _distribution(found: Distribution) -> dict[str, Any]:
    return {
        "kl_quantiles": _by_share(found.kl_quantiles),
        "kl_histogram": {"edges": list(found.kl_edges), "counts": list(found.kl_counts)},
        "delta_p_mean": found.delta_p_mean,
        "delta_p_rms": found.delta_p_rms,
        "delta_p_quantiles": _by_share(found.delta_p_quantiles),
        "confidence": [_bucket(bucket) for bucket in found.confidence],
        "nonfinite": found.nonfinite,
    }


def _trace(found: Trace) -> dict[str, Any]:
    data = asdict(found)
    return data if found.note else {key: value for key, value in data.items() if key != "note"}


def _trace_schema() -> Schema:
    keys = {"layers": _list(numbers_of(LayerError)), "broken": or_null(numbers_of(Broken))}
    return object_of(keys, {"note": TEXT})


def _onnx_schema() -> Schema:
    """A graph run in several ways, each with its distances."""
    apart = or_null(numbers_of(Distance))
    way = object_of({"name": TEXT, "from_prefill": apart, "from_source": apart})
    found = numbers_of(GraphFindings)
    lists = {"window_tokens": _list(COUNT), "ways": _list(way), "breaches": TEXTS}
    return {**found, "properties": {**found["properties"], **lists}}


def _with_list(schema: Schema, key: str, items: type) -> Schema:
    """The schema of numbers, one of which is a list of such objects."""
    return {**schema, "properties": {**schema["properties"], key: _list(numbers_of(items))}}


def _by_share(quantiles: dict[float, float]) -> dict[str, float]:
    return {f"{share:g}": value for share, value in quantiles.items()}


def _bucket(bucket: Bucket) -> dict[str, Any]:
    facts = asdict(bucket)
    return {"from": facts.pop("low"), "to": facts.pop("high"), **facts}


def _distribution_schema() -> Schema:
    quantiles = map_of(MAYBE_NUMBER)
    counts = {"type": "array", "items": COUNT}
    numbers = dict.fromkeys(("mean_kl", "mean_kl_stderr", "same_top1"), MAYBE_NUMBER)
    return object_of(
        {
            "kl_quantiles": quantiles,
            "kl_histogram": object_of({"edges": _list(NUMBER), "counts": counts}),
            "delta_p_mean": MAYBE_NUMBER,
            "delta_p_rms": MAYBE_NUMBER,
            "delta_p_quantiles": quantiles,
            "confidence": _list(object_of({"from": NUMBER, "to": NUMBER, "tokens": COUNT, **numbers})),
            "nonfinite": COUNT,
        }
    )


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}
