"""Reads a report that may lack any key: what is not there, or not of its kind, is None or empty.

A report just made has tuples where one that was stored has lists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

Facts: TypeAlias = Mapping[str, Any]


def number(facts: Facts, key: str) -> float | None:
    """A finite number."""
    return as_number(facts.get(key))


def as_number(value: Any) -> float | None:
    """The value where it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def numbers(facts: Facts, key: str) -> list[float]:
    """A list of finite numbers; empty where one of them is none."""
    values = facts.get(key)
    found = [as_number(value) for value in values] if isinstance(values, list | tuple) else []
    known = [value for value in found if value is not None]
    return known if len(known) == len(found) else []


def text(facts: Facts, key: str) -> str:
    """A text, or a number as text."""
    value = facts.get(key)
    return "" if value is None or isinstance(value, dict | list) else str(value)


def texts(facts: Facts, key: str) -> list[str]:
    """A list of texts."""
    values = facts.get(key)
    return [str(value) for value in values] if isinstance(values, list | tuple) else []


def part(facts: Facts, key: str) -> Facts:
    """Facts within facts."""
    value = facts.get(key)
    return value if isinstance(value, dict) else {}


def parts(facts: Facts, key: str) -> list[Facts]:
    """A list of facts."""
    values = facts.get(key)
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list | tuple) else []


def artifacts(report: Facts) -> list[Facts]:
    """Every artifact of the report."""
    return parts(report, "artifacts")


def artifacts_with(report: Facts, key: str) -> list[tuple[int, Facts, Facts]]:
    """Artifacts that have something under a key: their number in the report, they themselves, and what they have."""
    found = ((place, artifact, part(artifact, key)) for place, artifact in enumerate(artifacts(report), 1))
    return [item for item in found if item[2]]


def labelled(report: Facts) -> bool:
    """Whether labels of texts were scored, as a classifier's are."""
    return bool(texts(part(report, "tokens"), "labels"))


def scored_word(report: Facts) -> str:
    """What one of the scored is called."""
    return "label" if labelled(report) else "token"


def adapted(report: Facts) -> bool:
    """Whether an adapter was released, as far as the report tells; a plain model has no base to gain over."""
    reference = part(report, "reference")
    return bool(part(reference, "base") or part(reference, "merged"))
