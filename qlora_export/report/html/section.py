"""A section of the page: what its template is given, and under which heading it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_export.report.html.reading import Facts, text


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading that the list of contents names; `place` is its anchor."""

    place: str
    heading: str
    lead: str
    template: str
    facts: Mapping[str, Any]


def name_of(artifact: Facts) -> str:
    """What the artifact is called."""
    return text(artifact, "name") or "unnamed"
