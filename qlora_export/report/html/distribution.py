"""How KL is spread over tokens: histograms, quantiles, and KL by how sure the reference was."""

from __future__ import annotations

import math

from qlora_export.report.html.elements import Markup, code, element, joined
from qlora_export.report.html.figures import DASH, count, counted, share, significant
from qlora_export.report.html.histogram import histogram_chart, histogram_table, readable
from qlora_export.report.html.reading import Facts, artifacts_with, number, part, parts, scored_word
from qlora_export.report.html.section import Section, artifact_heading, name_of
from qlora_export.report.html.table import Cell, Column, Row, folded, measured, table

QUANTILES = {"0.5": "median", "0.9": "90%", "0.95": "95%", "0.99": "99%", "0.999": "99.9%", "1": "largest"}
# Half a power of ten a shade, from a thousandth of a nat.
PALEST, SHADES = -3.0, 7

Found = list[tuple[int, Facts, Facts]]


def distribution(report: Facts) -> Section | None:
    """The section, where the report tells of a distribution."""
    found = artifacts_with(report, "distribution")
    if not found:
        return None
    word = scored_word(report)
    lead = f"A mean hides its tail. This is the divergence of single {word}s, from the usual one to the worst."
    body = joined(_figures(found, word), _quantiles(found, word), _confidence(found, word))
    return Section("distribution", f"KL by {word}", lead, body)


def _figures(found: Found, word: str) -> Markup | None:
    figures = [_figure(place, artifact, facts, word) for place, artifact, facts in found if _drawn(facts)]
    if not figures:
        return None
    note = element("p", "Dashed bars at the ends hold all that is beyond the axis.", class_="said")
    return joined(element("div", figures, class_="figures"), note)


def _drawn(facts: Facts) -> bool:
    return readable(part(facts, "kl_histogram"))


def _figure(place: int, artifact: Facts, facts: Facts, word: str) -> Markup:
    drawing = histogram_chart(f"histogram-{place}", name_of(artifact), facts, word)
    numbers = histogram_table(name_of(artifact), part(facts, "kl_histogram"), word)
    heading = element("figcaption", artifact_heading(artifact))
    return element("figure", heading, drawing, folded("The numbers", numbers))


def _quantiles(found: Found, word: str) -> Markup | None:
    rows = [_quantile_row(artifact, facts) for _, artifact, facts in found if part(facts, "kl_quantiles")]
    if not rows:
        return None
    names = (*QUANTILES.values(), "change of p, mean", "change of p, RMS", "not finite")
    columns = [Column("artifact"), *(Column(name, numeric=True) for name in names)]
    note = f"Change of p: of the probability that the {word} of the text gets, candidate less reference."
    return joined(
        element("h3", "Quantiles of KL", class_="aside"),
        table(f"KL that this share of the {word}s does not exceed, in nats", columns, rows, sortable=True),
        element("p", note, class_="said"),
    )


def _quantile_row(artifact: Facts, facts: Facts) -> list[Cell | Markup]:
    quantiles = part(facts, "kl_quantiles")
    values = [number(quantiles, key) for key in QUANTILES]
    mean, spread, broken = (number(facts, key) for key in ("delta_p_mean", "delta_p_rms", "nonfinite"))
    return [
        code(name_of(artifact)),
        *(Cell(significant(value, 2), value) for value in values),
        Cell(_points(mean), mean),
        Cell(_points(spread), spread),
        Cell(count(broken), broken, "decided fail" if broken else None),
    ]


def _points(value: float | None) -> str:
    """A difference of probabilities, in points of a per cent."""
    return DASH if value is None else f"{significant(value * 100, 2)} pp"


def _confidence(found: Found, word: str) -> Markup | None:
    buckets: dict[tuple[float, float], float | None] = {}
    for _, _, facts in found:
        for bucket in parts(facts, "confidence"):
            buckets.setdefault(_ends(bucket), number(bucket, "tokens"))
    if not buckets:
        return None
    columns = [Column("artifact")]
    for (low, high), tokens in sorted(buckets.items()):
        note = "" if tokens is None else counted(tokens, word)
        columns.append(Column(f"{low * 100:g}% to {high * 100:g}%", numeric=True, note=note))
    rows: list[Row] = [
        [code(name_of(artifact)), *_shaded({_ends(item): item for item in parts(facts, "confidence")}, sorted(buckets))]
        for _, artifact, facts in found
        if parts(facts, "confidence")
    ]
    said = (
        f"{word.capitalize()}s by the probability of what the reference held for most likely. Drift where the "
        "reference was sure changes what the model says; where it was not, the text was open anyway. In small: same "
        "top-1."
    )
    return joined(
        element("h3", "KL by confidence of the reference", class_="aside"),
        table("Mean KL by confidence of the reference, in nats", columns, rows, sortable=True),
        element("p", said, class_="said"),
    )


def _ends(bucket: Facts) -> tuple[float, float]:
    return number(bucket, "from") or 0.0, number(bucket, "to") or 0.0


def _shaded(mine: dict[tuple[float, float], Facts], buckets: list[tuple[float, float]]) -> list[Cell]:
    return [_shaded_cell(mine.get(ends, {})) for ends in buckets]


def _shaded_cell(bucket: Facts) -> Cell:
    mean = number(bucket, "mean_kl")
    if mean is None:
        return Cell(DASH)
    shown = measured(significant(mean, 2), number(bucket, "mean_kl_stderr"))
    same = number(bucket, "same_top1")
    beneath = None if same is None else element("small", share(same))
    return Cell(joined(shown, " ", beneath), mean, f"shade-{_shade(mean)}")


def _shade(mean: float) -> int:
    """How dark: 0 for nothing, then one shade for every half power of ten."""
    if mean <= 0:
        return 0
    return min(max(math.ceil((math.log10(mean) - PALEST) * 2), 0), SHADES - 1)
