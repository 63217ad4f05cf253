"""Mark the Pareto front of each group of comparable rows."""

import math
from collections.abc import Sequence
from typing import Any

from toolchain.report.row import TRUSTED_GRADES, ReportRow


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return for each (cost, value) point True if no other point dominates it: cost at most as high, value at least as
    high, one of them strictly.  Equal points are treated alike; a point with NaN is never on the front.
    """
    order = sorted(
        (index for index, point in enumerate(points) if not any(math.isnan(number) for number in point)),
        key=lambda index: (points[index][0], -points[index][1]),
    )
    on_front = [False] * len(points)
    last: tuple[float, float] | None = None
    for index in order:  # sorted by cost, so a later point is on the front only with more value
        if last is None or points[index] == last or points[index][1] > last[1]:
            on_front[index], last = True, points[index]
    return on_front


def front_groups(rows: Sequence[ReportRow]) -> dict[tuple[Any, ...], list[ReportRow]]:
    """Return the rows with latency and accuracy in groups of comparable rows, one front each."""
    groups: dict[tuple[Any, ...], list[ReportRow]] = {}
    for row in rows:
        if row["status"] == "ok" and row["p50_ms"] is not None and row["top1"] is not None:
            key = (row["device"], row["machine"], row["batch"], row["headline"])
            groups.setdefault(key, []).append(row)
    return groups


def point(row: ReportRow) -> tuple[float, float]:
    """Return latency (ms) and accuracy (fraction) of a row that has both."""
    assert row["p50_ms"] is not None
    assert row["top1"] is not None
    return float(row["p50_ms"]), float(row["top1"])


def group_title(rows: Sequence[ReportRow]) -> str:
    """Return device, machine and batch of one front, for a heading."""
    first = rows[0]
    return ", ".join(str(part) for part in (first["device"], first["machine"], f"batch {first['batch']}") if part)


def mark_front(group: Sequence[ReportRow]) -> None:
    """Set `pareto` among rows of grades A and B; if there are none, among all rows, which are then flagged as noisy.

    The front contains only models that can ship.  A checkpoint measured in PyTorch is drawn too, but it is never on the
    front and dominates no other row.
    """
    shipped = [row for row in group if row["pytorch"] is None]
    ranked = [row for row in shipped if row["grade"] in TRUSTED_GRADES]
    if not ranked:
        ranked = shipped
        for row in ranked:
            row["flags"].append("noisy")
    for row, on_front in zip(ranked, pareto_front([point(row) for row in ranked]), strict=True):
        row["pareto"] = on_front
