"""A histogram of KL on a logarithmic axis: the outermost bars hold everything beyond the edges."""

from __future__ import annotations

from itertools import pairwise

from qlora_export.report.html.chart import Plane, chart, level_axis, line, value_axis, words
from qlora_export.report.html.elements import Markup, element, joined
from qlora_export.report.html.figures import count, share, significant
from qlora_export.report.html.reading import Facts, number, numbers, part
from qlora_export.report.html.scale import Scale
from qlora_export.report.html.table import Cell, Column, table

WIDTH, HEIGHT = 560.0, 260.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 548.0, 52.0, 214.0


def readable(histogram: Facts) -> bool:
    """Whether it can be drawn: rising edges above zero, and a bar more than edges."""
    edges, counts = numbers(histogram, "edges"), numbers(histogram, "counts")
    rising = all(low < high for low, high in pairwise(edges))
    return len(edges) > 1 and edges[0] > 0 and rising and len(counts) == len(edges) + 1 and sum(counts) > 0


def histogram_chart(place: str, name: str, distribution: Facts, word: str) -> Markup:
    """The chart of one artifact; `word` is what one of the scored is called."""
    histogram, quantiles = part(distribution, "kl_histogram"), part(distribution, "kl_quantiles")
    edges, counts = numbers(histogram, "edges"), numbers(histogram, "counts")
    total, step = sum(counts), edges[1] / edges[0]
    ends = [edges[0] / step, *edges, edges[-1] * step]
    across = Scale(ends[0], ends[-1], LEFT, RIGHT, logarithmic=True)
    plane = Plane(WIDTH, HEIGHT, across, Scale(0.0, 100 * max(counts) / total * 1.05, BOTTOM, TOP))
    bars = [
        _bar(
            plane,
            low,
            high,
            100 * many / total,
            _said(edges, number_of, many, word),
            outer=number_of in (0, len(edges)),
        )
        for number_of, ((low, high), many) in enumerate(zip(pairwise(ends), counts, strict=True))
    ]
    marks = [
        _quantile(plane, number(quantiles, key), said, height)
        for key, said, height in (("0.5", "median", 12.0), ("0.99", "99%", 29.0))
    ]
    median, most = (significant(number(quantiles, key), 2) for key in ("0.5", "0.99"))
    description = f"Share of {word}s by KL; the median is {median} nats, 99% of {word}s are below {most}."
    axes = joined(level_axis(plane, f"% of {word}s", 4), value_axis(plane, "KL, nats"))
    return chart(place, f"Distribution of KL, {name}", description, plane, axes, bars, marks)


def histogram_table(name: str, histogram: Facts, word: str) -> Markup:
    """The numbers of the chart."""
    edges, counts = numbers(histogram, "edges"), numbers(histogram, "counts")
    total = sum(counts)
    columns = (Column("KL, nats"), Column(f"{word}s", numeric=True), Column("share", numeric=True))
    rows = [
        (_span(edges, place), Cell(count(many), many), Cell(share(many / total, 2), many / total))
        for place, many in enumerate(counts)
    ]
    return table(f"{word.capitalize()}s by KL, {name}", columns, rows)


def _bar(plane: Plane, low: float, high: float, height: float, said: str, outer: bool) -> Markup | None:
    if not height:
        return None
    left, right, top = plane.across.place(low), plane.across.place(high), plane.up.place(height)
    return element(
        "rect",
        element("title", said),
        x=left + 0.5,
        y=top,
        width=max(right - left - 1, 0.5),
        height=plane.bottom - top,
        class_="bar outer" if outer else "bar",
    )


def _quantile(plane: Plane, value: float | None, said: str, height: float) -> Markup | None:
    if value is None or value <= 0:
        return None
    x = plane.across.place(value)
    anchor = "start" if x < (plane.left + plane.right) / 2 else "end"
    shift = 4 if anchor == "start" else -4
    named = words(x + shift, height, f"{said} {significant(value, 2)}", anchor, "quantile-name")
    return joined(line(x, height - 8, x, plane.bottom, "quantile"), named)


def _said(edges: list[float], place: int, many: float, word: str) -> str:
    return f"{_span(edges, place)}: {count(many)} {word}s"


def _span(edges: list[float], place: int) -> str:
    if place == 0:
        return f"below {significant(edges[0], 2)}"
    if place == len(edges):
        return f"{significant(edges[-1], 2)} and more"
    return f"{significant(edges[place - 1], 2)} to {significant(edges[place], 2)}"
