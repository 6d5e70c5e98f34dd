"""How KL is spread over tokens: histograms, quantiles, and KL by how sure the reference was."""

from __future__ import annotations

import math

from qlora_export.report.html.figures import DASH, counted, significant
from qlora_export.report.html.histogram import histogram_chart, histogram_rows, readable
from qlora_export.report.html.reading import Facts, artifacts_with, number, part, parts, scored_word
from qlora_export.report.html.section import Section, name_of

QUANTILES = {"0.5": "median", "0.9": "90%", "0.95": "95%", "0.99": "99%", "0.999": "99.9%", "1": "largest"}
# Half a power of ten a shade, from a thousandth of a nat.
PALEST, SHADES = -3.0, 7


def distribution(report: Facts) -> Section | None:
    """The section, where the report tells of a distribution."""
    found = artifacts_with(report, "distribution")
    if not found:
        return None
    word = scored_word(report)
    drawn = [(place, artifact, facts, part(facts, "kl_histogram")) for place, artifact, facts in found]
    facts = {
        "word": word,
        "figures": [
            (artifact, histogram_chart(f"histogram-{place}", name_of(artifact), facts, word), histogram_rows(histogram))
            for place, artifact, facts, histogram in drawn
            if readable(histogram)
        ],
        "quantiles": QUANTILES,
        "spread": [(artifact, facts) for _, artifact, facts in found if part(facts, "kl_quantiles")],
        "points": _points,
        **_confidence([(artifact, parts(facts, "confidence")) for _, artifact, facts in found], word),
    }
    lead = f"A mean hides its tail. This is the divergence of single {word}s, from the usual one to the worst."
    return Section("distribution", f"KL by {word}", lead, "distribution.html", facts)


def _points(value: float | None) -> str:
    """A difference of probabilities, in points of a per cent."""
    return DASH if value is None else f"{significant(value * 100, 2)} pp"


def _confidence(found: list[tuple[Facts, list[Facts]]], word: str) -> dict[str, object]:
    """Buckets of the reference's confidence with how many are in each, and of every artifact what it has of them."""
    buckets: dict[tuple[float, float], float | None] = {}
    for _, mine in found:
        for bucket in mine:
            buckets.setdefault(_ends(bucket), number(bucket, "tokens"))
    heads = [
        (f"{low * 100:g}% to {high * 100:g}%", "" if tokens is None else counted(tokens, word))
        for (low, high), tokens in sorted(buckets.items())
    ]
    rows = [(artifact, {_ends(bucket): bucket for bucket in mine}) for artifact, mine in found if mine]
    cells = [(artifact, [mine.get(ends, {}) for ends in sorted(buckets)]) for artifact, mine in rows]
    return {"buckets": heads, "confidence": cells, "shade": _shade}


def _ends(bucket: Facts) -> tuple[float, float]:
    return number(bucket, "from") or 0.0, number(bucket, "to") or 0.0


def _shade(mean: float) -> int:
    """How dark: 0 for nothing, then one shade for every half power of ten."""
    if mean <= 0:
        return 0
    return min(max(math.ceil((math.log10(mean) - PALEST) * 2), 0), SHADES - 1)
