"""Mark the Pareto front of each group of comparable rows."""

import math
from collections.abc import Sequence
from typing import Any

from toolchain.report.row import TRUSTED_GRADES, ReportRow


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return which (cost, value) points are on the front: no other costs at most as much and is worth at least as
    much, one of the two strictly.  Equal points stand or fall together; a point with NaN is never on the front.
    """
    order = sorted(
        (index for index, point in enumerate(points) if not any(math.isnan(number) for number in point)),
        key=lambda index: (points[index][0], -points[index][1]),
    )
    on_front = [False] * len(points)
    last: tuple[float, float] | None = None
    for index in order:  # by cost, so that only value can still be gained
        if last is None or points[index] == last or points[index][1] > last[1]:
            on_front[index], last = True, points[index]
    return on_front


def front_groups(rows: Sequence[ReportRow]) -> dict[tuple[Any, ...], list[ReportRow]]:
    """Return the rows with a latency and an accuracy, by what makes two of them comparable: one front each."""
    groups: dict[tuple[Any, ...], list[ReportRow]] = {}
    for row in rows:
        if row["status"] == "ok" and row["p50_ms"] is not None and row["top1"] is not None:
            key = (row["device"], row["machine"], row["batch"], row["headline"])
            groups.setdefault(key, []).append(row)
    return groups


def point(row: ReportRow) -> tuple[float, float]:
    """Return latency in ms and accuracy as a fraction of a row of a front, which has both."""
    assert row["p50_ms"] is not None
    assert row["top1"] is not None
    return float(row["p50_ms"]), float(row["top1"])


def group_title(rows: Sequence[ReportRow]) -> str:
    """Return what the rows of one front have in common, for a heading."""
    first = rows[0]
    return ", ".join(str(part) for part in (first["device"], first["machine"], f"batch {first['batch']}") if part)


def mark_front(group: Sequence[ReportRow]) -> None:
    """Set `pareto` over grades A and B; where there is nothing better, over all, which are then flagged as noisy.

    The front is what there is to choose from: a checkpoint measured in PyTorch is drawn beside it, but does not ship,
    so that it neither stands on the front nor keeps anything off it.
    """
    shipped = [row for row in group if row["pytorch"] is None]
    ranked = [row for row in shipped if row["grade"] in TRUSTED_GRADES]
    if not ranked:
        ranked = shipped
        for row in ranked:
            row["flags"].append("noisy")
    for row, on_front in zip(ranked, pareto_front([point(row) for row in ranked]), strict=True):
        row["pareto"] = on_front
