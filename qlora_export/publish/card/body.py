"""The text of the managed block: what this is, how to load it, how far it drifted, what was assumed, how to check it.

Numbers come from the published report alone and names of the machine are left out, so the same publication gives the
same text wherever it is made. Its words are in `templates`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from qlora_export.publish.card.facts import CardFacts, drift_from
from qlora_export.publish.card.rendering import render
from qlora_export.publish.card.snippets import javascript, served, snippet
from qlora_export.report.markdown import ArtifactRow, ledger_table

LIMITS = (
    ("perplexity_ratio", "perplexity ratio at most {:g}", 1),
    ("mean_kl", "mean KL at most {:g}", 1),
    ("same_top1", "same top-1 at least {:.4g} %", 100),
    ("gain_kept", "gain kept at least {:.4g} %", 100),
    ("survival_min", "lowest survival at least {:.4g} %", 100),
)


def body(facts: CardFacts) -> str:
    """Everything between the two markers, as Markdown."""
    return render(
        "body.md",
        facts=facts,
        drift_table=drift_table,
        limits_in_words=limits_in_words,
        served=served,
        snippet=lambda item: Markup(snippet(facts, item)),  # noqa: S704 - templates of ours, as are these
        javascript=lambda item: Markup(javascript(facts, item) or ""),  # noqa: S704
    )


def drift_table(facts: CardFacts) -> Markup:
    """The ledger of the report with the artifacts of this repository."""
    reference = facts.report["reference"]
    base, merged = (drift_from(found) if found else None for found in (reference["base"], reference["merged"]))
    rows = [
        ArtifactRow(
            item.artifact.name, item.artifact.bytes, facts.drift(item), str(facts.entry(item).get("verdict", "pass"))
        )
        for item in facts.items
    ]
    return Markup(ledger_table(float(reference["perplexity"]), base, merged, rows))  # noqa: S704 - names of a recipe


def limits_in_words(limits: Mapping[str, Any]) -> str:
    """What the gate wanted of an artifact."""
    wanted = (words.format(limits[name] * scale) for name, words, scale in LIMITS if limits.get(name) is not None)
    return "; ".join(wanted) or "no limits"
