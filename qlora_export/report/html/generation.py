"""Greedy generation: for how many tokens an artifact writes what the reference writes."""

from __future__ import annotations

from qlora_export.report.html.reading import Facts, artifacts_with
from qlora_export.report.html.section import Section

LEAD = "Both models continue the same prompts, always by the most likely token; agreed is until the first other one."


def generation(report: Facts) -> Section | None:
    """The section, where text was generated."""
    found = artifacts_with(report, "generation")
    return Section("generation", "Generation", LEAD, "generation.html", {"found": found}) if found else None
