"""A comparison as a picture: the page's drawing of size against mean KL, painted into an SVG or a PNG.

Colours are those of Okabe and Ito, which people with any colour vision tell apart, and every width has a shape of its
own besides. A filled point keeps the recipe's limits. The stairs are the front: nothing below them is that small.
Cost: matplotlib, from the extra [report].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_export.drift.comparison.pareto import NOISE_NATS, recommend
from qlora_export.drift.comparison.rows import Comparison, Measured
from qlora_export.errors import EnvironmentProblem, UsageError
from qlora_export.merge.companion_files import ADAPTER_FOLDER
from qlora_export.report.comparison import comparison_data
from qlora_export.report.html import chart
from qlora_export.report.html.drift_and_size import placed_points
from qlora_export.report.html.reading import parts
from qlora_export.report.html.scatter import Point, scatter
from qlora_export.report.html.visible import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = (".svg", ".png")
PIXELS_PER_INCH = 160
# A hundredth of an inch is a pixel of the drawing.
FRAME = chart.Frame(900.0, 560.0, 66.0, 884.0, 64.0, 446.0)
POINTS = 0.72
FONT, LEGEND_COLUMN, LEGEND_LINE = 12 * POINTS, 270, 18
INK, QUIET, PAPER, GREY = "#1a1a1a", "#5a5a5a", "#ffffff", "#8a8a8a"
WIDTHS = {
    "16 and 32 bits": "#000000",
    "8 bits": "#0072B2",
    "4 bits": "#D55E00",
    "4 bits, adapter beside": "#009E73",
    "exported": "#CC79A7",
}
COLOURS = {f"series-{series}": colour for series, colour in enumerate(WIDTHS.values())} | {
    "grid": "#e4e4e4", "axis": INK, "limit": GREY, "front": GREY, "leader": GREY, "grey": GREY, "limit-name": QUIET,
}  # fmt: skip
STROKES = {"grid": 0.7, "axis": 0.8, "limit": 1.0, "front": 1.4, "error": 1.2, "leader": 0.7}


def require_plot(path: Path) -> None:
    """Raise before anything is measured when this cannot be drawn: UsageError, or EnvironmentProblem."""
    if path.suffix.lower() not in KINDS:
        raise UsageError(f"{path}: is no {' or '.join(KINDS)}", "the ending says what is drawn")
    if find_spec("matplotlib") is None:
        raise EnvironmentProblem("matplotlib is not installed", "pip install 'qlora-export[report]'")


def write_comparison_plot(found: Comparison, path: Path) -> None:
    """Draw size against mean KL into an SVG or a PNG, by the ending of the name."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    svg = path.suffix.lower() == ".svg"
    with mpl.rc_context({"svg.hashsalt": "qlora-export", "font.size": FONT}):
        figure = Figure((FRAME.width / 100, FRAME.height / 100), PIXELS_PER_INCH, facecolor=PAPER)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, FRAME.width), ylim=(FRAME.height, 0))
        axes.set_axis_off()
        for layer, shape in enumerate(plot_shapes(found)):
            _paint(axes, shape, layer)
        figure.savefig(path, format=path.suffix[1:].lower(), metadata={"Date": None} if svg else {"Software": None})


def plot_shapes(found: Comparison) -> list[chart.Shape]:
    """The drawing with its title and what its marks mean."""
    widths = {row.name: list(WIDTHS).index(_width(row.measured)) for row in found.rows if row.measured is not None}
    points = [
        replace(point, series=widths[point.name], note=_note(point))
        for _, point in placed_points(parts(comparison_data(found), "rows"))
    ]
    chosen = recommend(found).name
    title = f"Size and drift, {found.tokens.count:,} {found.tokens.unit}"
    title = f"{title}: {f'take {chosen}' if chosen else 'none keeps the limits'}"
    drawn = scatter(points, found.limits.mean_kl, FRAME)
    return [chart.Words(4, 26, title, "start", "title"), *drawn.shapes, *_legend(sorted(set(widths.values())))]


def _legend(series: Sequence[int]) -> list[chart.Shape]:
    names = [*(list(WIDTHS)[number] for number in series), "hollow: does not keep the limits"]
    drawn: list[chart.Shape] = []
    for place, name in enumerate([*names, "nothing smaller drifts less"]):
        x, y = 90 + LEGEND_COLUMN * (place % 3), FRAME.bottom + 62 + LEGEND_LINE * (place // 3)
        if place < len(series):
            drawn.append(chart.mark(x, y, series[place], kind="pass"))
        elif place < len(names):
            drawn.append(chart.Circle(x, y, 4, "grey fail"))
        else:
            drawn.append(chart.Line(x - 8, y, x + 8, y, "front"))
        drawn.append(chart.Words(x + 14, y + 4, name, "start"))
    return drawn


def _paint(axes: Axes, shape: chart.Shape, layer: int) -> None:
    """One shape over all before it."""
    from matplotlib import patches

    kinds = shape.kind.split()
    colour = next((COLOURS[kind] for kind in kinds if kind in COLOURS), INK)
    stroke = next((STROKES[kind] for kind in kinds if kind in STROKES), 1.6)
    filled: dict[str, Any] = {
        "facecolor": colour if "pass" in kinds else PAPER,
        "edgecolor": colour,
        "linewidth": stroke,
    }
    match shape:
        case chart.Line():
            dashes = (0, (5, 3)) if "limit" in kinds else "-"
            ends = ((shape.x, shape.other_x), (shape.y, shape.other_y))
            axes.plot(*ends, color=colour, linewidth=stroke, linestyle=dashes, zorder=layer)
        case chart.Words():
            side = {"start": "left", "middle": "center", "end": "right"}[shape.anchor]
            family = "monospace" if "point-name" in kinds else "sans-serif"
            weight, larger = "bold" if "leads" in kinds else "normal", 1.3 if "title" in kinds else 1.0
            axes.text(
                shape.x, shape.y, visible(shape.said), color=colour, horizontalalignment=side, zorder=layer,
                fontfamily=family, fontweight=weight, fontsize=FONT * larger, parse_math=False,
            )  # fmt: skip
        case chart.Circle():
            axes.add_patch(patches.Circle((shape.x, shape.y), shape.radius, zorder=layer, **filled))
        case chart.Path(closed=True):
            axes.add_patch(patches.Polygon(shape.corners, zorder=layer, **filled))
        case chart.Path():
            axes.plot(*zip(*shape.corners, strict=True), color=colour, linewidth=stroke, zorder=layer)


def _note(point: Point) -> str:
    """That a drift which is noise is not drawn where it is."""
    return f" (below {NOISE_NATS:g})" if point.drift <= NOISE_NATS else ""


def _width(measured: Measured) -> str:
    cost = measured.cost
    if cost is None:
        return "exported"
    if (measured.entry.artifact.path / ADAPTER_FOLDER).is_dir():
        return "4 bits, adapter beside"
    return "16 and 32 bits" if cost.bits_per_weight > 12 else "8 bits" if cost.bits_per_weight > 6 else "4 bits"
