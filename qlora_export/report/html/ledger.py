"""The ledger: a row a model, reasons and limits of the verdicts, and what the columns say."""

from __future__ import annotations

from qlora_export.report.html.figures import significant
from qlora_export.report.html.reading import Facts, adapted, artifacts, labelled, number, part, scored_word, texts
from qlora_export.report.html.section import Section
from qlora_export.report.html.verdicts import outcome

# Name, sign and whether it is a share, by the key of the limit.
LIMITS = {
    "perplexity_ratio": ("ratio", "\u2264", False),
    "mean_kl": ("mean KL", "\u2264", False),
    "same_top1": ("same top-1", "\u2265", True),
    "gain_kept": ("gain kept", "\u2265", True),
    "survival_min": ("lowest survival", "\u2265", True),
}


def ledger(report: Facts) -> Section:
    """The section of the ledger."""
    reference = part(report, "reference")
    lead = f"Every model on the same {scored_word(report)}s, compared with the one that was trained."
    if not reference:
        lead = "Nothing was measured: these artifacts were built, and not checked."
    judged = [artifact for artifact in artifacts(report) if part(artifact, "limits")]
    facts = {
        "reference": reference,
        "adapted": adapted(report),
        "labelled": labelled(report),
        "artifacts": artifacts(report),
        "documents": part(report, "document_perplexity"),
        "limits": LIMITS,
        "judged": [(artifact, part(artifact, "limits"), _broken(artifact)) for artifact in judged],
        "allowed": _allowed,
    }
    return Section("ledger", "Ledger", lead, "ledger.html", facts)


def _allowed(other: Facts) -> str:
    """By how much an artifact may drift further than another."""
    names = {"mean_kl": "mean KL further", "perplexity_ratio": "ratio to it"}
    known = [(name, value) for key, name in names.items() if (value := number(other, key)) is not None]
    return ", ".join(f"{name} \u2264 {significant(value, 4)}" for name, value in known)


def _broken(artifact: Facts) -> set[str]:
    """Limits that the verdict names, by the first words of its reasons."""
    if outcome(artifact) == "pass":
        return set()
    found = texts(artifact, "reasons")
    return {
        name
        for name, _, _ in LIMITS.values()
        if any(reason.startswith(f"{'perplexity ratio' if name == 'ratio' else name} is ") for reason in found)
    }
