"""A histogram of KL on a logarithmic axis: the outermost bars hold everything beyond the edges."""

from __future__ import annotations

from itertools import pairwise

from qlora_export.report.html.chart import Bar, Chart, Frame, Line, Plane, Shape, Words, level_axis, value_axis
from qlora_export.report.html.figures import count, significant
from qlora_export.report.html.reading import Facts, number, numbers, part

FRAME = Frame(560.0, 260.0, 46.0, 548.0, 52.0, 214.0)


def readable(histogram: Facts) -> bool:
    """Whether it can be drawn: rising edges above zero, and a bar more than edges."""
    edges, counts = numbers(histogram, "edges"), numbers(histogram, "counts")
    rising = all(low < high for low, high in pairwise(edges))
    return len(edges) > 1 and edges[0] > 0 and rising and len(counts) == len(edges) + 1 and sum(counts) > 0


def histogram_chart(place: str, name: str, distribution: Facts, word: str) -> Chart:
    """The chart of one artifact; `word` is what one of the scored is called."""
    histogram, quantiles = part(distribution, "kl_histogram"), part(distribution, "kl_quantiles")
    edges, rows = numbers(histogram, "edges"), histogram_rows(histogram)
    step = edges[1] / edges[0]
    ends = [edges[0] / step, *edges, edges[-1] * step]
    plane = FRAME.plane((ends[0], ends[-1]), (0.0, 100 * max(share for _, _, share in rows) * 1.05), (True, False))
    median, most = number(quantiles, "0.5"), number(quantiles, "0.99")
    outer = {0, len(edges)}
    bars = [
        _bar(plane, bar, 100 * share, f"{span}: {count(many)} {word}s", "bar outer" if place in outer else "bar")
        for place, (bar, (span, many, share)) in enumerate(zip(pairwise(ends), rows, strict=True))
        if many
    ]
    axes = [*level_axis(plane, f"% of {word}s", 4), *value_axis(plane, "KL, nats")]
    quantile_lines = [*_quantile(plane, median, "median", 12.0), *_quantile(plane, most, "99%", 29.0)]
    description = (
        f"Share of {word}s by KL; the median is {significant(median, 2)} nats, 99% of {word}s are below "
        f"{significant(most, 2)}."
    )
    return Chart(place, f"Distribution of KL, {name}", description, plane, [*axes, *bars, *quantile_lines])


def histogram_rows(histogram: Facts) -> list[tuple[str, float, float]]:
    """Of every bar its span of KL, how many are in it, and their share."""
    edges, counts = numbers(histogram, "edges"), numbers(histogram, "counts")
    said = [significant(edge, 2) for edge in edges]
    spans = [f"below {said[0]}", *(f"{low} to {high}" for low, high in pairwise(said)), f"{said[-1]} and more"]
    return [(span, many, many / sum(counts)) for span, many in zip(spans, counts, strict=True)]


def _bar(plane: Plane, span: tuple[float, float], height: float, said: str, kind: str) -> Shape:
    (left, right), top = map(plane.across.place, span), plane.up.place(height)
    return Bar(left + 0.5, top, max(right - left - 1, 0.5), plane.bottom - top, kind, said)


def _quantile(plane: Plane, value: float | None, said: str, height: float) -> list[Shape]:
    if value is None or value <= 0:
        return []
    x = plane.across.place(value)
    anchor, shift = ("start", 4) if x < (plane.left + plane.right) / 2 else ("end", -4)
    named = Words(x + shift, height, f"{said} {significant(value, 2)}", anchor, "quantile-name")
    return [Line(x, height - 8, x, plane.bottom, "quantile"), named]
