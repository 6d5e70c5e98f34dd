"""Multiple choice and labels: how often each model answers right, and the questions or texts whose answer flipped."""

from __future__ import annotations

from qlora_export.report.html.reading import Facts, artifacts_with
from qlora_export.report.html.section import Section

QUESTIONS = "Questions with answers to choose from. Equal scores can hide flips: lost and gained count them."
LABELS = "What the models predict of the texts. Equal accuracies can hide flips: lost and gained count them."


def choices(report: Facts) -> Section | None:
    """The section, where questions were asked."""
    return _answers(report, "choices", "Multiple choice", QUESTIONS, ("question", "right answer"))


def predicted_labels(report: Facts) -> Section | None:
    """The section of a classifier."""
    return _answers(report, "labels", "Labels", LABELS, ("text", "label"))


def _answers(report: Facts, key: str, heading: str, lead: str, words: tuple[str, str]) -> Section | None:
    """The section of what was answered; `words` are for what was asked and for the right answer."""
    found = artifacts_with(report, key)
    facts = {"found": found, "item": words[0], "right": words[1]}
    return Section(key, heading, lead, "choices.html", facts) if found else None
