"""Draw the accuracy-latency front as PNG or SVG for papers and pull requests.  Matplotlib is imported on use."""

import io
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from toolchain.precisions import PRECISIONS
from toolchain.report.pareto import front_groups, group_title, point
from toolchain.report.row import ROLE_COLORS, TRUSTED_GRADES, Report, ReportRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_REFERENCE_MARKER = "X"  # for PyTorch rows of any precision

_INK, _QUIET, _GRID = "#1a1a1a", "#5f6368", "#e4e6e8"
_LABEL_DARKNESS = 0.62  # factor on a role's colour; gives each a contrast of at least 4.5 : 1 on white


def render_chart(report: Report, form: Literal["png", "svg"]) -> bytes:
    """Draw top-1 against p50 (logarithmic) with both intervals, and the front as a line; one panel for each device."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(front_groups(report["rows"]).values())
    figure = Figure(figsize=(8, 5.2 * max(1, len(groups))), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)  # needed to measure text
    if not groups:
        figure.text(0.5, 0.5, "no row has both a latency and an accuracy yet", ha="center", color=_QUIET)
    panels = [(figure.add_subplot(len(groups), 1, place), group) for place, group in enumerate(groups, 1)]
    for axes, group in panels:
        _draw_panel(axes, group)
    figure.draw_without_rendering()  # fixes the layout, which placing labels needs
    figure.set_layout_engine("none")
    for axes, group in panels:
        _place_labels(axes, group)
    content = io.BytesIO()
    with rc_context({"svg.hashsalt": "clipkd", "svg.fonttype": "none"}):  # reproducible bytes; text stays text
        figure.savefig(content, format=form, metadata={"Date": None} if form == "svg" else None)
    return content.getvalue()


def latency_axis(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[float, float], list[float]]:
    """Return limits in ms that leave room around the intervals, and round ticks on a logarithmic axis."""
    ends = [row[key] for row in rows for key in ("p50_ms", "p50_low_ms", "p50_high_ms") if row[key] is not None]
    low, high = math.log10(min(ends)), math.log10(max(ends))
    room = max(0.18 * (high - low), 0.1)
    low, high = low - room, high + room
    for mantissas in ((1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        decades = range(math.floor(low), math.ceil(high) + 1)
        ticks = [m * 10.0**decade for decade in decades for m in mantissas if low <= math.log10(m) + decade <= high]
        if len(ticks) >= 4:
            return (10**low, 10**high), ticks
    # below about half a decade: even spacing, with the largest step of 1, 2 or 5 times 10^n that gives four ticks
    wanted = (10**high - 10**low) / 5
    decade = 10.0 ** math.floor(math.log10(wanted))
    step = max(m * decade for m in (1, 2, 5) if m * decade <= wanted)
    ticks = [step * count for count in range(math.ceil(10**low / step), math.floor(10**high / step) + 1)]
    return (10**low, 10**high), ticks


def accuracy_axis(rows: Sequence[ReportRow]) -> tuple[float, float]:
    """Return limits in percent that leave room around the intervals."""
    known = (end for row in rows for end in (row["top1"], row["top1_low"], row["top1_high"]) if end is not None)
    ends = [100 * end for end in known]
    room = max(0.14 * (max(ends) - min(ends)), 1.0)
    return max(min(ends) - room, -1.0), min(max(ends) + room, 101.0)


def front_line(rows: Sequence[ReportRow]) -> list[tuple[float, float]]:
    """Return the front's points (ms, percent) from fast to slow."""
    return sorted((p50_ms, 100 * top1) for p50_ms, top1 in (point(row) for row in rows if row["pareto"]))


def lay_out_axes(axes: "Axes", rows: Sequence[Mapping[str, Any]]) -> None:
    """Set a logarithmic latency axis for the rows, a light grid, and no frame."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    limits, ticks = latency_axis(rows)
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_QUIET)
    axes.tick_params(colors=_QUIET, labelsize=9)


def _draw_panel(axes: "Axes", group: Sequence[ReportRow]) -> None:
    lay_out_axes(axes, group)
    axes.set_ylim(*accuracy_axis(group))
    headline = group[0]["headline"]
    axes.set_title(f"{headline}: zero-shot accuracy against latency", loc="left", color=_INK, fontsize=12, pad=22)
    axes.text(
        0, 1.02, f"{group_title(group)}; up and left is better", transform=axes.transAxes, color=_QUIET, fontsize=9
    )
    axes.set_xlabel("median latency of the image tower, ms", color=_INK, fontsize=10)
    axes.set_ylabel("top-1, %", color=_INK, fontsize=10)
    line = front_line(group)  # empty if the group has only reference rows
    axes.plot(*zip(*line, strict=True), color=_INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
    for row in group:
        _draw_point(axes, row)
    key = "dashed: Pareto front    lines: 95 % intervals    hollow: grade C"
    if any(row["pytorch"] for row in group):
        key += "    cross: PyTorch (reference)"
    axes.text(1, -0.16, key, transform=axes.transAxes, ha="right", va="top", color=_QUIET, fontsize=8)


def _draw_point(axes: "Axes", row: ReportRow) -> None:
    """Draw a row's marker and both of its intervals, in the colour of its role."""
    p50_ms, top1 = point(row)
    color = ROLE_COLORS.get(str(row["role"]), _INK)
    trusted = row["grade"] in TRUSTED_GRADES
    if row["p50_low_ms"] is not None and row["p50_high_ms"] is not None:
        axes.hlines(100 * top1, row["p50_low_ms"], row["p50_high_ms"], color=color, linewidth=1.4, zorder=3)
    if row["top1_low"] is not None and row["top1_high"] is not None:
        axes.vlines(p50_ms, 100 * row["top1_low"], 100 * row["top1_high"], color=color, linewidth=1.4, zorder=3)
    axes.plot(
        p50_ms,
        100 * top1,
        marker=_marker(row),
        markersize=8,
        markerfacecolor=color if trusted else "white",
        markeredgecolor=color,
        markeredgewidth=1.6,
        zorder=4,
    )


def _marker(row: ReportRow) -> str:
    if row["pytorch"]:
        return _REFERENCE_MARKER
    return PRECISIONS[str(row["precision"])].marker if row["precision"] in PRECISIONS else "o"


def _place_labels(axes: "Axes", group: Sequence[ReportRow]) -> None:
    """Place each name where it overlaps the least with markers, intervals, the front and other names."""
    from matplotlib.transforms import Bbox

    def pixels(p50_ms: float, top1: float) -> tuple[float, float]:
        x, y = axes.transData.transform((p50_ms, 100 * top1))
        return float(x), float(y)

    def box(first: tuple[float, float], second: tuple[float, float], margin: float) -> Bbox:
        xs, ys = sorted((first[0], second[0])), sorted((first[1], second[1]))
        return Bbox([[xs[0] - margin, ys[0] - margin], [xs[1] + margin, ys[1] + margin]])

    taken: list[Bbox] = []
    for row in group:
        p50_ms, top1 = point(row)
        center = pixels(p50_ms, top1)
        taken.append(box(center, center, 12))
        if row["p50_low_ms"] is not None and row["p50_high_ms"] is not None:
            taken.append(box(pixels(row["p50_low_ms"], top1), pixels(row["p50_high_ms"], top1), 3))
        if row["top1_low"] is not None and row["top1_high"] is not None:
            taken.append(box(pixels(p50_ms, row["top1_low"]), pixels(p50_ms, row["top1_high"]), 3))
    line = [pixels(p50_ms, percent / 100) for p50_ms, percent in front_line(group)]
    for (x0, y0), (x1, y1) in pairwise(line):
        steps = max(2, int(math.hypot(x1 - x0, y1 - y0) / 12))
        along = [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)]
        taken += [box(point, point, 3) for point in along]

    for row in group:
        tried = [_label(axes, row, direction, distance) for distance in (9, 20, 34, 50) for direction in _DIRECTIONS]
        extents = [annotation.get_window_extent() for annotation in tried]
        covered = [_overlap(extent, taken, axes.bbox) for extent in extents]
        best = covered.index(min(covered))
        for place, annotation in enumerate(tried):
            if place != best:
                annotation.remove()
        taken.append(extents[best].padded(4))


_DIRECTIONS = ((1, -1), (-1, 1), (1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
_SIDES = {-1: ("right", "top"), 0: ("center", "center"), 1: ("left", "bottom")}


def _label(axes: "Axes", row: ReportRow, direction: tuple[int, int], distance: int) -> "Annotation":
    from matplotlib.colors import to_rgb

    near = distance < 15
    p50_ms, top1 = point(row)
    red, green, blue = (_LABEL_DARKNESS * channel for channel in to_rgb(ROLE_COLORS.get(str(row["role"]), _INK)))
    return axes.annotate(
        row["name"],
        (p50_ms, 100 * top1),
        (direction[0] * distance, direction[1] * distance),
        textcoords="offset points",
        ha=_SIDES[direction[0]][0],
        va=_SIDES[direction[1]][1],
        fontsize=9.5,
        color=(red, green, blue),
        zorder=5,
        arrowprops=None if near else {"arrowstyle": "-", "color": _QUIET, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5},
    )


def _overlap(extent: "Bbox", taken: Sequence["Bbox"], inside: "Bbox") -> float:
    """Return a label's overlap with occupied areas in pixels, plus twice its area outside the panel."""
    from matplotlib.transforms import Bbox

    def area(box: Bbox | None) -> float:
        return 0.0 if box is None else float(box.width * box.height)

    outside = area(extent) - area(Bbox.intersection(extent, inside))
    return 2 * outside + sum(area(Bbox.intersection(extent, other)) for other in taken)
