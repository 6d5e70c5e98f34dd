"""A comparison as a picture: size of the folder against mean KL, both on logarithmic axes, as SVG or PNG.

Colours are those of Okabe and Ito, which people with any colour vision tell apart, and every width has a shape of its
own besides. A filled point keeps the recipe's limits. The stairs are the front: nothing below them is that small.
Cost: matplotlib, from the extra [report].
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_export.drift.comparison.pareto import NOISE_NATS, front, points, recommend
from qlora_export.drift.comparison.rows import Comparison, Measured
from qlora_export.drift.gate import Z_95
from qlora_export.errors import EnvironmentProblem, UsageError
from qlora_export.merge.companion_files import ADAPTER_FOLDER
from qlora_export.report.label_places import Box, place_labels

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

KINDS = (".svg", ".png")
INCHES = (9.0, 5.6)
PIXELS_PER_INCH = 160
INK, PAPER, GREY = "#1a1a1a", "#ffffff", "#8a8a8a"
STYLES = {
    "16 and 32 bits": ("#000000", "o"),
    "8 bits": ("#0072B2", "s"),
    "4 bits": ("#D55E00", "^"),
    "4 bits, adapter beside": ("#009E73", "D"),
    "exported": ("#CC79A7", "X"),
}
MARKER_POINTS = 8.0


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
    with mpl.rc_context({"svg.hashsalt": "qlora-export", "font.size": 10, "axes.linewidth": 0.8}):
        figure = Figure(figsize=INCHES, dpi=PIXELS_PER_INCH, layout="constrained", facecolor=PAPER)
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(facecolor=PAPER)
        _draw_axes(axes, found)
        _draw_points(axes, found)
        _draw_front(axes, found)
        _draw_labels(figure, axes, found)
        figure.savefig(path, format=path.suffix[1:].lower(), metadata={"Date": None} if svg else {"Software": None})


def _draw_axes(axes: Axes, found: Comparison) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    places = _places(found).values()
    sizes, drifts = zip(*places, strict=True)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(min(sizes) / 1.25, max(sizes) * 1.35)
    axes.set_ylim(min(*drifts, NOISE_NATS * 3) / 2.2, max(*drifts, found.limits.mean_kl or 0) * 2.5)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("size of the folder, MB")
    axes.set_ylabel("mean KL from the model that was trained, nats")
    title = f"Size and drift, {found.tokens.count:,} {found.tokens.unit}"
    chosen = recommend(found).name
    axes.set_title(f"{title}: {f'take {chosen}' if chosen else 'none keeps the limits'}", loc="left", color=INK)
    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    limit = found.limits.mean_kl
    if limit:
        axes.axhline(limit, color=GREY, linewidth=1, linestyle=(0, (5, 3)), zorder=1)
        axes.annotate(
            f"limit {limit:g}", (1, limit), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", ha="right", color="#5a5a5a", fontsize=9,
        )  # fmt: skip


def _draw_points(axes: Axes, found: Comparison) -> None:
    from matplotlib.lines import Line2D

    places, used = _places(found), dict[str, None]()
    for row in found.rows:
        if row.measured is None:
            continue
        kind = _kind(row.measured)
        used[kind] = None
        colour, marker = STYLES[kind]
        across, up = places[row.name]
        reach = Z_95 * row.measured.entry.drift.mean_kl_stderr
        if up > NOISE_NATS:
            low, high = max(up - reach, NOISE_NATS / 3), up + reach
            axes.plot([across, across], [low, high], color=colour, linewidth=1.2, zorder=2)
        passes = row.measured.entry.verdict.outcome == "pass"
        axes.plot(
            [across], [up], marker=marker, color=colour, markersize=MARKER_POINTS, zorder=4, linestyle="none",
            markerfacecolor=colour if passes else PAPER, markeredgewidth=1.6,
        )  # fmt: skip
    handles = [
        Line2D([], [], color=STYLES[kind][0], marker=STYLES[kind][1], linestyle="none", markersize=7, label=kind)
        for kind in STYLES
        if kind in used
    ]
    hollow = Line2D([], [], color=GREY, marker="o", linestyle="none", markersize=7, markerfacecolor=PAPER)
    hollow.set_label("hollow: does not keep the limits")
    handles.append(hollow)
    handles.append(Line2D([], [], color=GREY, linewidth=1.4, label="nothing smaller drifts less"))
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=3, frameon=False, fontsize=9,
        handletextpad=0.4, columnspacing=1.4,
    )  # fmt: skip


def _draw_front(axes: Axes, found: Comparison) -> None:
    across, up = zip(*_stairs(axes, found), strict=True)
    axes.plot(across, up, color=GREY, linewidth=1.4, zorder=1)


def _stairs(axes: Axes, found: Comparison) -> list[tuple[float, float]]:
    """Corners of the front: right at the drift of one point, down at the size of the next."""
    places = _places(found)
    corners, drift = list[tuple[float, float]](), axes.get_ylim()[1]
    for name in front(points(found)):
        across, up = places[name]
        corners += [(across, drift), (across, up)]
        drift = up
    return [*corners, (axes.get_xlim()[1], drift)]


def _draw_labels(figure: Figure, axes: Axes, found: Comparison) -> None:
    """Names beside the points, moved until none covers another, with a thin line where a name lies apart."""
    figure.draw_without_rendering()
    chosen = recommend(found).name
    names = list(_places(found))
    anchors = [tuple(axes.transData.transform(place)) for place in _places(found).values()]
    texts = [axes.text(0, 0, _label(name, found), fontsize=9) for name in names]
    for name, text in zip(names, texts, strict=True):
        text.set_fontweight("bold" if name == chosen else "normal")
    extents = [text.get_window_extent() for text in texts]
    pixels = PIXELS_PER_INCH / 72
    half = MARKER_POINTS * pixels / 2 + 2
    markers = [Box(x - half, y - half, 2 * half, 2 * half) for x, y in anchors]
    frame = axes.get_window_extent()
    lines = _boxes(axes.transData.transform(_stairs(axes, found)))
    if found.limits.mean_kl:
        height = axes.transData.transform((1, found.limits.mean_kl))[1]
        lines.append(Box(frame.x0, height - 2, frame.width, 4))
    boxes = place_labels(
        anchors,
        [(extent.width, extent.height) for extent in extents],
        Box(frame.x0, frame.y0, frame.width, frame.height),
        [*markers, *lines],
        pixels,
    )
    for text, box, (x, y) in zip(texts, boxes, anchors, strict=True):
        text.set_position(tuple(axes.transData.inverted().transform((box.left, box.bottom))))
        text.set_color(INK)
        text.set_zorder(5)
        text.set_verticalalignment("bottom")
        near_x = min(max(x, box.left), box.left + box.width)
        near_y = min(max(y, box.bottom), box.bottom + box.height)
        crowded = sum(abs(x - other_x) + abs(y - other_y) < 12 * pixels for other_x, other_y in anchors) > 1
        if crowded or abs(near_x - x) + abs(near_y - y) > 16 * pixels:
            ends = axes.transData.inverted().transform([(x, y), (near_x, near_y)])
            axes.plot(ends[:, 0], ends[:, 1], color=GREY, linewidth=0.7, zorder=3)


def _boxes(corners: NDArray[np.float64]) -> list[Box]:
    """Thin boxes along the lines between corners, each upright or level."""
    return [
        Box(min(x, other_x) - 2, min(y, other_y) - 2, abs(x - other_x) + 4, abs(y - other_y) + 4)
        for (x, y), (other_x, other_y) in pairwise(corners)
    ]


def _label(name: str, found: Comparison) -> str:
    """The name, and that a drift which is noise is not drawn where it is."""
    return name if points(found)[name][1] > NOISE_NATS else f"{name} (below {NOISE_NATS:g})"


def _places(found: Comparison) -> dict[str, tuple[float, float]]:
    """Megabytes and nats by name."""
    return {name: (count / 1e6, drift) for name, (count, drift) in points(found).items()}


def _kind(measured: Measured) -> str:
    cost = measured.cost
    if cost is None:
        return "exported"
    if (measured.entry.artifact.path / ADAPTER_FOLDER).is_dir():
        return "4 bits, adapter beside"
    return "16 and 32 bits" if cost.bits_per_weight > 12 else "8 bits" if cost.bits_per_weight > 6 else "4 bits"
