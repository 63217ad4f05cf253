"""Compare a report with an older one, and list the changes that are worse than tolerated."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.report.row import FIELDS, Report, ReportRow
from toolchain.significance import MIN_PROCESSES, differ_significantly
from toolchain.text_table import TextTable

_IDENTITY = tuple(name for name, field in FIELDS.items() if field.identity)


@dataclass(frozen=True)
class Change:
    """The change of a row that both reports have."""

    name: str
    p50_ratio: float | None
    """New over old; above 1 is slower."""

    is_significant: bool
    """True if the latencies are significantly different: by the medians of their processes (significance.py), or by
    disjoint 95 % intervals if a report has too few processes."""

    top1_change: float | None
    """New minus old; below 0 is worse."""

    worse: list[str]
    """The changes beyond tolerance, as text."""


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    only_old: list[str]
    only_new: list[str]

    @property
    def holds(self) -> bool:
        """Return True if nothing got worse beyond tolerance; a missing row counts as worse."""
        return not self.only_old and not any(change.worse for change in self.changes)


def compare(old: Report, new: Report, *, max_slower: float, max_top1_loss: float) -> Comparison:
    """Return what changed in the rows that both reports have, and which rows only one of them has.

    Rows match if their `identity` fields agree (row.py); rows with equal identities are matched by name.

    A row is slower if its ratio exceeds 1 + `max_slower` and the latencies are significantly different, or if that
    cannot be tested.  It is less accurate if it loses more than `max_top1_loss`, a fraction of the images.
    """
    before, after = _by_identity(old["rows"]), _by_identity(new["rows"])
    changes = [_change(before[key], after[key], max_slower, max_top1_loss) for key in after if key in before]
    return Comparison(
        changes,
        [str(row["name"]) for key, row in before.items() if key not in after],
        [str(row["name"]) for key, row in after.items() if key not in before],
    )


def _by_identity(rows: Sequence[ReportRow]) -> dict[tuple[Any, ...], ReportRow]:
    found: dict[tuple[Any, ...], ReportRow] = {}
    for row in rows:
        key = tuple(row.get(field) for field in _IDENTITY)
        found[(*key, row["name"]) if key in found else key] = row
    return found


def _change(old: ReportRow, new: ReportRow, max_slower: float, max_top1_loss: float) -> Change:
    worse = []
    ratio = None if not old["p50_ms"] or new["p50_ms"] is None else new["p50_ms"] / old["p50_ms"]
    significant = _differs(old, new)
    if ratio is not None and not ratio <= 1 + max_slower and significant:  # not `>`: NaN must fail, here and below
        worse.append(f"{100 * (ratio - 1):.1f} % slower")
    if old["p50_ms"] is not None and new["p50_ms"] is None:
        worse.append("its latency is missing now")
    change = None if old["top1"] is None or new["top1"] is None else new["top1"] - old["top1"]
    if change is not None and not change >= -max_top1_loss:
        worse.append(f"{-100 * change:.1f} points of top-1 lost")
    if old["top1"] is not None and new["top1"] is None:
        worse.append("its top-1 is missing now")
    if old["status"] == "ok" and new["status"] != "ok":
        worse.append(f"status: {new['status']}")
    return Change(str(new["name"]), ratio, significant, change, worse)


def _differs(old: ReportRow, new: ReportRow) -> bool:
    processes = [row.get("p50_by_process_ms") or [] for row in (old, new)]
    if not all(latency is not None and 0 < latency < math.inf for medians in processes for latency in medians):
        return True  # NaN, which other reports have as null, cannot be tested
    if all(len(medians) >= MIN_PROCESSES for medians in processes):  # fewer could never show a difference
        return differ_significantly(*processes)
    old_low, old_high = old["p50_low_ms"], old["p50_high_ms"]
    new_low, new_high = new["p50_low_ms"], new["p50_high_ms"]
    if old_low is None or old_high is None or new_low is None or new_high is None:
        return True
    return not (new_low <= old_high and old_low <= new_high)  # True for NaN


def comparison_table(compared: Comparison) -> TextTable:
    """Return a table of changed models, then of missing ones, then of new ones."""
    rows = []
    for change in compared.changes:
        ratio = "-" if change.p50_ratio is None else f"{change.p50_ratio:.3f}"
        if change.p50_ratio is not None and not change.is_significant:
            ratio += " (not significant)"
        points = "-" if change.top1_change is None else f"{100 * change.top1_change:+.1f} pp"
        rows.append([change.name, ratio, points, "; ".join(change.worse)])
    rows += [[name, "-", "-", "missing"] for name in compared.only_old]
    rows += [[name, "-", "-", "(new)"] for name in compared.only_new]
    return TextTable(["name", "p50 new / old", "top-1 change", "worse"], rows)
