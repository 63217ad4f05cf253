"""Draw the students chart: latency against published accuracy, GMACs and parameters.  Imports Matplotlib."""

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.students.documents import MeasuredStudent, Worth
from export.students.measure import WORTH
from toolchain.precisions import PRECISIONS
from toolchain.report.chart import lay_out_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

Box = tuple[float, float, float, float]  # left, low, right, high; in pixels

_INK, _QUIET, _GRID = "#1a1a1a", "#5f6368", "#e4e6e8"
_PANELS: dict[Worth, tuple[float, str, str]] = {
    "published_fp32_top1": (100.0, "ImageNet zero-shot top-1, published for the float model, %", "Published accuracy"),
    "gmacs": (1.0, "GMACs of one image", "The work of a forward pass"),
    "params_image": (1e-6, "parameters of the image tower, M", "Parameters"),
}
_OFFSETS = [
    (x * distance, y * distance)
    for distance in (7, 13, 20, 28)
    for x, y in ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
]


def render_students(fit: Sequence[MeasuredStudent]) -> bytes:
    """Return a PNG of latency against published accuracy, GMACs and parameters, with the front of each precision."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [field for field in reversed(WORTH) if any(row[field] is not None for row in fit)]
    figure = Figure(figsize=(9, 5.0 * max(1, len(shown))), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)  # the figure needs a canvas to measure text
    if not shown:
        figure.text(0.5, 0.5, "no candidate could be measured", ha="center", color=_QUIET)
    panels = [(figure.add_subplot(len(shown), 1, place), field) for place, field in enumerate(shown, 1)]
    for axes, field in panels:
        _draw_panel(axes, fit, field)
    figure.draw_without_rendering()  # fixes the layout, which placing the names needs
    figure.set_layout_engine("none")
    for axes, field in panels:
        _place_names(axes, [row for row in fit if row[field] is not None], field)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_panel(axes: "Axes", fit: Sequence[MeasuredStudent], field: Worth) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    _, unit, title = _PANELS[field]
    rows = [row for row in fit if row[field] is not None]
    lay_out_axes(axes, [dict(row) for row in fit])  # the same x range in every panel
    if field != "published_fp32_top1":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(y=0.08)
    axes.set_title(f"{title} against latency", loc="left", color=_INK, fontsize=12)
    where = f"{fit[0]['device']}, {fit[0]['runtime']}"
    axes.set_xlabel(f"median latency of the image tower at batch 1 on {where}, ms", color=_INK, fontsize=10)
    axes.set_ylabel(unit, color=_INK, fontsize=10)
    for name in dict.fromkeys(row["name"] for row in rows):  # connects the precisions of one student
        spread = [row["p50_ms"] for row in rows if row["name"] == name]
        value = next(_worth(row, field) for row in rows if row["name"] == name)
        axes.hlines(value, min(spread), max(spread), color=_GRID, linewidth=2.5, zorder=1)
    for precision in dict.fromkeys(row["precision"] for row in fit):
        color, marker = PRECISIONS[precision].color, PRECISIONS[precision].marker
        front = sorted(
            (row["p50_ms"], _worth(row, field))
            for row in rows
            if row["precision"] == precision and field in row["front"]
        )
        axes.plot(*zip(*front, strict=True), color=color, linewidth=1.1, linestyle=(0, (4, 3)), zorder=2)
        for row in (row for row in rows if row["precision"] == precision):
            value = _worth(row, field)
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


def _worth(row: MeasuredStudent, field: Worth) -> float:
    """Return a row's value of a metric in the unit of its panel; NaN if unknown."""
    value = row[field]
    return math.nan if value is None else _PANELS[field][0] * value


def _place_names(axes: "Axes", rows: Sequence[MeasuredStudent], field: Worth) -> None:
    """Write each student's name once, next to one of its points, where it covers least."""
    from matplotlib.patheffects import withStroke

    points = [axes.transData.transform((row["p50_ms"], _worth(row, field))).tolist() for row in rows]
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in points]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [point for point, row in zip(points, rows, strict=True) if row["name"] == name]
        taken.append((min(x for x, _ in own), own[0][1] - 3, max(x for x, _ in own), own[0][1] + 3))
    for precision in dict.fromkeys(row["precision"] for row in rows):
        of_precision = [(p, row) for p, row in zip(points, rows, strict=True) if row["precision"] == precision]
        for (x0, y0), (x1, y1) in pairwise(sorted(point for point, row in of_precision if field in row["front"])):
            steps = max(2, int(math.hypot(x1 - x0, y1 - y0) / 10))
            along = [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)]
            taken += [(x - 4, y - 4, x + 4, y + 4) for x, y in along]
    legend = axes.get_legend()
    taken += [_box(legend.get_window_extent())] if legend is not None else []
    inside = _box(axes.get_window_extent())
    per_point = axes.figure.get_dpi() / 72
    for name in dict.fromkeys(row["name"] for row in rows):
        halo = withStroke(linewidth=2.5, foreground="white")
        start = rows[0]["p50_ms"], _worth(rows[0], field)
        text = axes.text(*start, name, fontsize=8, color=_INK, zorder=5, va="bottom", path_effects=[halo])
        extent = text.get_window_extent()
        tried = []
        for (x, y), row in zip(points, rows, strict=True):
            for dx, dy in _OFFSETS if row["name"] == name else ():
                left = x + dx * per_point - extent.width * (1 - _sign(dx)) / 2
                low = y + dy * per_point - extent.height * (1 - _sign(dy)) / 2
                box = left, low, left + extent.width, low + extent.height
                tried.append((_overlap(box, np.array(taken), inside) + 0.1 * (dx * dx + dy * dy), box))
        _, best = min(tried)
        taken.append(best)
        left, low = axes.transData.inverted().transform(best[:2])
        text.set_position((left, low))


def _box(extent: "Bbox") -> Box:
    return extent.x0, extent.y0, extent.x1, extent.y1


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)


def _overlap(box: Box, taken_N4: NDArray[np.float64], inside: Box) -> float:
    """Return the pixels of a name that cover something, plus twice those outside of the panel."""

    def covered_area(others_N4: NDArray[np.float64]) -> float:
        sides_N2 = np.minimum(box[2:], others_N4[:, 2:]) - np.maximum(box[:2], others_N4[:, :2])
        return float(sides_N2.clip(0).prod(1).sum())

    area = (box[2] - box[0]) * (box[3] - box[1])
    return 2 * (area - covered_area(np.array([inside]))) + covered_area(taken_N4)
