"""Choose the model to ship: the best row of a report that meets all conditions, and the reasons against the others.

A condition compares a field of report.json with a number or a word; commas join conditions, and all must hold:

    p90_ms<=10, top1_drop_vs_teacher<=0.02, precision!=fp32
"""

import difflib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.errors import UsageError, name_some
from toolchain.report.missing import measure_commands
from toolchain.report.row import FIELDS, Number, ReportRow
from toolchain.text_table import TextTable

NUMBERS = {name: field.better for name, field in FIELDS.items() if field.better is not None}
"""Numeric fields that can be compared; 1 if more is better, -1 if less is better."""

COMPARABLE = tuple(name for name, field in FIELDS.items() if isinstance(field.kind, Number))
"""Numeric fields that a condition may use."""

WORDS = tuple(name for name, field in FIELDS.items() if field.where)
"""Text fields that a condition may use."""

COMPARED_ROLES = ("teacher", "baseline")
"""Roles that do not ship: they are measured to compare the shipped model with."""

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
_CONDITION = re.compile(r"\s*([A-Za-z_0-9.]+)\s*(<=|>=|!=|==|<|>|=)\s*(.+?)\s*")
_NO_CANDIDATE = ("reference row", "only for comparison")
"""The openings of the reasons against rows that do not ship."""

_SUFFIXES = {"k": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class Condition:
    """One comparison of a field with a value."""

    field: str
    comparison: str
    value: float | str

    def __str__(self) -> str:
        return f"{self.field}{self.comparison}{self.value if isinstance(self.value, str) else f'{self.value:g}'}"

    def unmet_by(self, row: Mapping[str, Any]) -> str | None:
        """Return why a row does not meet the condition, or None if it does; unknown values do not meet it."""
        found = row.get(self.field)
        if found is None:
            return f"{self.field} is unknown"
        if _COMPARISONS[self.comparison](found, self.value):
            return None
        return f"{self.field} is {found if isinstance(found, str) else f'{found:.4g}'}, not {self.shown}"

    @property
    def shown(self) -> str:
        return f"{self.comparison}{self.value if isinstance(self.value, str) else f'{self.value:g}'}"


@dataclass(frozen=True)
class Choice:
    """The best row, the runner-up, and the rejected rows with their reasons."""

    best: ReportRow | None
    runner_up: ReportRow | None
    rejected: list[tuple[ReportRow, list[str]]]
    """Every other row of the device, each with its reasons."""

    warnings: list[str]


def conditions(text: str) -> list[Condition]:
    """Return the conditions of `--where`.

    Raises: UsageError for an unknown field, an invalid comparison, or any other text.
    """
    return [_condition(part) for part in text.split(",") if part.strip()]


def choose_model(
    rows: Sequence[ReportRow], where: Sequence[Condition], by: str, device: str | None, include: Sequence[str] = ()
) -> Choice:
    """Return the row that is best in field `by` among those that meet every condition; the fastest of equals.

    A teacher or a baseline is chosen only if its role is in `include`.  A row that was not measured has no device, and
    is rejected on any.

    Raises: UsageError if the device has no row, or the rows are of several devices and none was given.
    """
    unknown = [role for role in include if role not in COMPARED_ROLES]
    if unknown:
        raise UsageError(f"--include {unknown[0]}: expected {' or '.join(COMPARED_ROLES)}; other models always count")
    devices = sorted({row["device"] for row in rows if row["device"] is not None})
    if device is None and len(devices) > 1:
        raise UsageError(f"the rows are of several devices ({', '.join(devices)}); choose one with --device")
    if device is not None and devices and device not in devices:
        raise UsageError(f"--device {device}: no rows of this device; expected one of: {', '.join(devices)}")
    here = [row for row in rows if device is None or row["device"] in (device, None)]
    _direction(by)
    reasons = {id(row): _reasons(row, where, by, include) for row in here}
    fit = sorted((row for row in here if not reasons[id(row)]), key=lambda row: _order(row, by))
    rejected = [(row, reasons[id(row)]) for row in here if reasons[id(row)]]
    for row in fit[1:]:
        rejected.append((row, [_behind(row, fit[0], by)]))
    return Choice(fit[0] if fit else None, fit[1] if len(fit) > 1 else None, rejected, _warnings(fit, by))


def explain_no_choice(choice: Choice, where: Sequence[Condition]) -> str:
    """Return why no model was chosen, and what to do about it."""
    rows = [row for row, reasons in choice.rejected if not any(reason.startswith(_NO_CANDIDATE) for reason in reasons)]
    commands = "".join(f"\n  {command}" for command in measure_commands(rows))
    if not rows:
        return "no model that ships was exported; --include teacher and --include baseline consider the others"
    if all(row["status"] != "ok" for row in rows):
        return f"no model that ships is measured completely. Measure first:{commands}"
    if where:
        return f"no model meets: {', '.join(map(str, where))}; relax a condition, see the reasons above"
    return "no model can be chosen, for the reasons above" + (
        f". Measure what is missing:{commands}" if commands else ""
    )


def _condition(part: str) -> Condition:
    match = _CONDITION.fullmatch(part)
    if match is None:
        raise UsageError(
            f"--where: {part.strip()!r} is not a condition; expected FIELD<=NUMBER, as in 'p90_ms<=10, top1>=0.3'"
        )
    field, comparison, value = match.groups()
    if field in WORDS:
        if comparison not in ("=", "==", "!="):
            raise UsageError(f"--where: {part.strip()!r}: {field} is text; compare it with = or !=")
        return Condition(field, comparison, value.strip("'\""))
    _require_field(field, (*COMPARABLE, *WORDS), "--where cannot compare")
    number, factor = (value[:-1], _SUFFIXES[value[-1]]) if value[-1] in _SUFFIXES else (value, 1.0)
    try:
        bound = float(number) * factor
    except ValueError:
        bound = float("nan")
    if bound != bound:
        percent = "; write 2 % as 0.02" if value.endswith("%") else ""
        raise UsageError(f"--where: {part.strip()!r}: expected a number after {comparison}, got {value!r}{percent}")
    return Condition(field, comparison, bound)


def _direction(field: str) -> int:
    _require_field(field, tuple(NUMBERS), "--by cannot rank by")
    return NUMBERS[field]


def _require_field(field: str, usable: Sequence[str], cannot: str) -> None:
    """Raise a UsageError for a field that is not usable; `cannot` opens the message for a field that rows have."""
    if field in usable:
        return
    if field == "device":
        raise UsageError(f"{cannot} device; choose a device with --device")
    if field in FIELDS:
        raise UsageError(f"{cannot} {field}; expected one of: {', '.join(usable)}")
    near = difflib.get_close_matches(field, usable, 1)
    raise UsageError(
        f"unknown field {field!r}; " + (f"did you mean {near[0]}?" if near else f"known fields: {', '.join(usable)}")
    )


def _reasons(row: ReportRow, where: Sequence[Condition], by: str, include: Sequence[str]) -> list[str]:
    """Return why a row is not chosen, however the others are."""
    reasons = [] if row["status"] == "ok" else [f"status: {row['status']}"]
    if row["pytorch"] is not None:
        reasons.append(f"{_NO_CANDIDATE[0]}: the checkpoint in PyTorch, which is not an exported model")
    elif row["role"] in COMPARED_ROLES and row["role"] not in include:
        reasons.append(f"{_NO_CANDIDATE[1]}; --include {row['role']} considers it")
    reasons += filter(None, (condition.unmet_by(row) for condition in where))
    if row.get(by) is None and f"{by} is unknown" not in reasons:
        reasons.append(f"{by} is unknown")
    return reasons


def _order(row: Mapping[str, Any], by: str) -> tuple[float, float, str]:
    speed = float("inf") if row["p50_ms"] is None else row["p50_ms"]
    return -_direction(by) * row[by], speed, str(row["name"])


def _behind(row: Mapping[str, Any], best: Mapping[str, Any], by: str) -> str:
    if row[by] == best[by]:
        return f"{by} is the same, but {best['name']} is faster"
    return f"{by} is {row[by]:.4g}, that of {best['name']} {best[by]:.4g}"


def _warnings(fit: Sequence[ReportRow], by: str) -> list[str]:
    if not fit:
        return []
    best, warnings = fit[0], []
    if best["grade"] == "C":
        flags = ", ".join(best["flags"])
        warnings.append(
            f"{best['name']} was measured with grade C ({flags}): measure again on an idle machine before you ship it"
        )
    sets = {f"{row['headline']} ({row['num_eval_images']:,} images)" for row in fit if row["num_eval_images"]}
    if len(sets) > 1 and "top1" in by:
        warnings.append(
            f"{by} is of different evaluation sets, which cannot be compared: {name_some(sorted(sets))}. Give all runs "
            "the same evaluate section, then: clipkd evaluate"
        )
    if len(fit) > 1 and by == "top1":
        low, high = best["top1_low"], fit[1]["top1_high"]
        if low is not None and high is not None and low <= high:
            warnings.append(f"the 95 % intervals of top-1 of {best['name']} and the runner-up {fit[1]['name']} overlap")
    return warnings


def rejected_table(choice: Choice) -> TextTable:
    """Return why each of the other models was not chosen."""
    rows = [[str(row["name"]), "; ".join(reasons)] for row, reasons in choice.rejected]
    return TextTable(["rejected", "why"], rows, no_wrap=["rejected"])


def choice_lines(choice: Choice) -> list[str]:
    """Return one line each for the best model and the runner-up, with their measurements and folders."""
    lines = []
    for title, row in (("best", choice.best), ("runner-up", choice.runner_up)):
        if row is None:
            continue
        facts = [f"top-1 {100 * row['top1']:.1f} %"] if row["top1"] is not None else []
        facts += [f"p50 {row['p50_ms']:.3g} ms"] if row["p50_ms"] is not None else []
        facts += [f"{row['size_bytes'] / 1e6:.3g} MB"] if row["size_bytes"] else []
        place = f"{row['run']}/exported/{row['model']}" if row["run"] else str(row["source"])
        lines.append(f"{title}: {row['name']} ({', '.join(facts)})  {place}")
    return lines
