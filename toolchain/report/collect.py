"""Collect the rows of a report from the measurements in runs, and compare them with each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.errors import ArtifactError
from toolchain.precisions import PRECISIONS
from toolchain.report.measured import measured_models
from toolchain.report.pareto import front_groups, mark_front
from toolchain.report.row import (
    ROLES,
    SCHEMA,
    Report,
    ReportRow,
    complete_row,
    measured_folder,
    read_row,
    runtime_name,
)
from toolchain.significance import paired_drop

RightAnswers = NDArray[np.bool_] | None
"""[N] True for each headline image that a model classified correctly; None if that was not stored."""


def collect(runs: Sequence[Path], external: Sequence[Mapping[str, Any]] = ()) -> Report:
    """Return the content of report.json, from `exported/`, `measured/` and the training stages' manifests of runs, and
    from rows measured elsewhere (external_rows.py).

    A checkpoint that was measured in PyTorch has a reference row; its `pytorch` field is how it was run.

    Raises: ArtifactError if nothing was exported, or for a file with invalid content.
    """
    rows = [read_row(found) for run in runs for found in measured_models(run)]
    rows += [complete_row(row) for row in external]
    rows.sort(key=_reading_order)
    for row, name in zip(rows, _unique_names(rows), strict=True):
        row["name"] = row["name"] or name
    rows = [complete_row({**row, **drops}) for row, drops in zip(rows, _drops(rows), strict=True)]
    for group in front_groups(rows).values():
        mark_front(group)
    return {"schema": SCHEMA, "rows": rows}


# --- order and names -------------------------------------------------------------------------------------------------


def _reading_order(row: ReportRow) -> tuple[Any, ...]:
    def place(value: Any, order: tuple[str, ...]) -> int:
        return order.index(value) if value in order else len(order)

    where = (row["device"] is None, row["device"] or "", row["machine"] or "")
    what = (
        place(row["role"], ROLES),
        place(row["precision"], tuple(PRECISIONS)),
        row["runtime"] or "",
        row["model"] or "",
    )
    return *where, *what, row["run"] or "", row["name"]


def _unique_names(rows: Sequence[ReportRow]) -> list[str]:
    """Return role and precision as names, with as many more details as make them unique."""
    names = [row["name"] or (f"{row['role']} {row['precision']}" if row["role"] else str(row["model"])) for row in rows]
    details = (
        [Path(row["run"]).name if row["run"] else None for row in rows],
        [runtime_name(row) for row in rows],
        [row["device"] for row in rows],
        [row["machine"] for row in rows],
        [row["model"] for row in rows],
    )
    for values in details:
        alike: dict[str, set[str | None]] = {}
        for name, value in zip(names, values, strict=True):
            alike.setdefault(name, set()).add(value)
        names = [
            f"{name} {value or ''}".strip() if len(alike[name]) > 1 else name
            for name, value in zip(names, values, strict=True)
        ]
    return names


# --- accuracy against another row ------------------------------------------------------------------------------------


def _drops(rows: Sequence[ReportRow]) -> list[dict[str, float]]:
    """Return for each row the fields that compare it with the teacher and with its own fp32 model."""
    right = {id(row): _right_answers(row) for row in rows}
    found = []
    for row in rows:
        teacher = _reference(rows, row, role="teacher", precision=None)
        fp32 = _reference(rows, row, role=row["role"], precision="fp32")
        found.append(_drop(row, teacher, right, "teacher") | _drop(row, fp32, right, "fp32"))
    return found


def _reference(
    rows: Sequence[ReportRow], row: ReportRow, *, role: str | None, precision: str | None
) -> ReportRow | None:
    """Return the row of the same run and images to compare with; prefer fp32, then the same runtime, then device."""
    candidates = [
        other
        for other in rows
        if other["run"] is not None
        and other["run"] == row["run"]
        and other["role"] == role
        and precision in (None, other["precision"])
        and other["top1"] is not None
        and (other["headline"], other["num_eval_images"]) == (row["headline"], row["num_eval_images"])
    ]

    def closeness(other: ReportRow) -> tuple[bool, ...]:
        return (
            other["precision"] == "fp32",
            other["runtime"] == row["runtime"],
            other["device"] == row["device"],
            other["machine"] == row["machine"],
            other["batch"] == row["batch"],
        )

    return max(candidates, key=closeness, default=None)


def _right_answers(row: ReportRow) -> RightAnswers:
    folder = measured_folder(row)
    if folder is None or row["headline"] is None:
        return None
    samples = folder / "samples.npz"
    if not samples.exists():
        return None
    try:
        with np.load(samples, allow_pickle=False) as saved:
            rank_N = saved.get(f"{row['headline']}_rank")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{samples}: cannot be read: {error}. Delete its folder and measure again") from None
    return None if rank_N is None or len(rank_N) != row["num_eval_images"] else rank_N < 1


def _drop(
    row: ReportRow, reference: ReportRow | None, right: Mapping[int, RightAnswers], against: str
) -> dict[str, float]:
    """Return the top-1 drop from a reference on the same images, with a paired test if the answers were stored."""
    if reference is None or reference["top1"] is None or row["top1"] is None:
        return {}
    key = f"top1_drop_vs_{against}"
    first, second = right[id(reference)], right[id(row)]
    if first is None or second is None or row is reference:
        return {key: float(reference["top1"] - row["top1"])}
    found = paired_drop(first, second)
    return {key: found.drop, f"{key}_low": found.low, f"{key}_high": found.high, f"{key}_p": found.p}
