"""Untrained students as a picture: measured latency against what one would pay it for; Matplotlib is imported here."""

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from export.students import WORTH
from toolchain.report_picture import latency_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

Row = dict[str, Any]

_COLORS = {"fp32": "#0072B2", "fp16": "#009E73", "bf16": "#CC79A7", "int8": "#D55E00"}  # Wong, Nature Methods 8
_MARKERS = {"fp32": "o", "bf16": "^", "fp16": "s", "int8": "D"}
_INK, _QUIET, _GRID = "#1a1a1a", "#5f6368", "#e4e6e8"
_PANELS = {
    "published_fp32_top1": (100.0, "ImageNet zero-shot top-1, published of the float model, %", "Published accuracy"),
    "gmacs": (1.0, "GMACs of one image", "The work of a forward pass"),
    "params_image": (1e-6, "parameters of the image tower, M", "Parameters"),
}
_OFFSETS = [
    (x * distance, y * distance)
    for distance in (7, 13, 20, 28)
    for x, y in ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
]


def render_students(rows: Sequence[Row]) -> bytes:
    """A PNG: latency against published accuracy, GMACs and parameters; of each precision its front is drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fit = [row for row in rows if row["status"] == "ok"]
    shown = [field for field in reversed(WORTH) if any(row[field] is not None for row in fit)]
    figure = Figure(figsize=(9, 5.0 * max(1, len(shown))), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)  # measures text
    if not shown:
        figure.text(0.5, 0.5, "no candidate could be measured", ha="center", color=_QUIET)
    panels = [(figure.add_subplot(len(shown), 1, place), field) for place, field in enumerate(shown, 1)]
    for axes, field in panels:
        _draw_panel(axes, fit, field)
    figure.draw_without_rendering()  # settles the layout, without which names cannot be placed
    figure.set_layout_engine("none")
    for axes, field in panels:
        _place_names(axes, [row for row in fit if row[field] is not None], field)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_panel(axes: "Axes", fit: Sequence[Row], field: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    factor, unit, title = _PANELS[field]
    rows = [row for row in fit if row[field] is not None]
    limits, ticks = latency_axis(fit)  # the same for every panel
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if field != "published_fp32_top1":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(y=0.08)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_QUIET)
    axes.tick_params(colors=_QUIET, labelsize=9)
    axes.set_title(f"{title} against latency", loc="left", color=_INK, fontsize=12)
    where = f"{fit[0]['device']}, {fit[0]['runtime']}"
    axes.set_xlabel(f"median latency of the image tower at batch 1 on {where}, ms", color=_INK, fontsize=10)
    axes.set_ylabel(unit, color=_INK, fontsize=10)
    for name in dict.fromkeys(row["name"] for row in rows):  # one student, in its precisions
        spread = [row["p50_ms"] for row in rows if row["name"] == name]
        value = next(factor * row[field] for row in rows if row["name"] == name)
        axes.hlines(value, min(spread), max(spread), color=_GRID, linewidth=2.5, zorder=1)
    for precision in dict.fromkeys(row["precision"] for row in fit):
        color, marker = _COLORS[precision], _MARKERS[precision]
        front = sorted(
            (row["p50_ms"], factor * row[field])
            for row in rows
            if row["precision"] == precision and field in row["front"]
        )
        axes.plot(*zip(*front, strict=True), color=color, linewidth=1.1, linestyle=(0, (4, 3)), zorder=2)
        for row in (row for row in rows if row["precision"] == precision):
            value = factor * row[field]
            axes.hlines(value, row["p50_low_ms"], row["p50_high_ms"], color=color, linewidth=1.4, zorder=3)
            axes.plot(
                row["p50_ms"],
                value,
                marker=marker,
                markersize=6.5,
                markerfacecolor="white" if row["grade"] == "C" else color,
                markeredgecolor=color,
                markeredgewidth=1.4,
                zorder=4,
            )
        axes.plot([], [], marker, color=color, label=precision)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    key = "dashed: the front of a precision    lines: 95 % intervals    hollow: grade C"
    axes.text(1, 1.01, key, transform=axes.transAxes, ha="right", va="bottom", color=_QUIET, fontsize=8)


def _place_names(axes: "Axes", rows: Sequence[Row], field: str) -> None:
    """Writes each student's name once, beside one of its points, where it covers least."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    factor = _PANELS[field][0]
    points = [axes.transData.transform((row["p50_ms"], factor * row[field])) for row in rows]
    taken = [Bbox([[x - 8, y - 8], [x + 8, y + 8]]) for x, y in points]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [point for point, row in zip(points, rows, strict=True) if row["name"] == name]
        taken.append(Bbox([[min(x for x, _ in own), own[0][1] - 3], [max(x for x, _ in own), own[0][1] + 3]]))
    for precision in dict.fromkeys(row["precision"] for row in rows):
        of_precision = [(p, row) for p, row in zip(points, rows, strict=True) if row["precision"] == precision]
        front = sorted(tuple(point) for point, row in of_precision if field in row["front"])
        for (x0, y0), (x1, y1) in pairwise(front):
            steps = max(2, int(math.hypot(x1 - x0, y1 - y0) / 10))
            along = [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)]
            taken += [Bbox([[x - 4, y - 4], [x + 4, y + 4]]) for x, y in along]
    legend = axes.get_legend()
    taken += [legend.get_window_extent()] if legend is not None else []
    inside = axes.get_window_extent()
    for name in dict.fromkeys(row["name"] for row in rows):
        best: tuple[float, Bbox, dict[str, Any]] | None = None
        for row in (row for row in rows if row["name"] == name):
            for x, y in _OFFSETS:
                words = {
                    "text": name,
                    "xy": (row["p50_ms"], factor * row[field]),
                    "xytext": (x, y),
                    "textcoords": "offset points",
                    "ha": "left" if x > 0 else "right" if x < 0 else "center",
                    "va": "bottom" if y > 0 else "top" if y < 0 else "center",
                    "fontsize": 8,
                    "color": _INK,
                    "zorder": 5,
                    "path_effects": [withStroke(linewidth=2.5, foreground="white")],
                }
                tried = axes.annotate(**words)
                extent = tried.get_window_extent()
                tried.remove()
                cost = _covered(extent, taken, inside) + 0.1 * (x * x + y * y)
                if best is None or cost < best[0]:
                    best = cost, extent, words
        assert best is not None
        taken.append(best[1])
        axes.annotate(**best[2])


def _covered(extent: "Bbox", taken: Sequence["Bbox"], inside: "Bbox") -> float:
    """Pixels of a name that lie on something, and, counted double, outside of the panel."""
    from matplotlib.transforms import Bbox

    def area(box: Bbox | None) -> float:
        return 0.0 if box is None else float(box.width * box.height)

    outside = area(extent) - area(Bbox.intersection(extent, inside))
    return 2 * outside + sum(area(Bbox.intersection(extent, other)) for other in taken)
