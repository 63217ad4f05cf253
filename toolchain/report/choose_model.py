"""Choose the model to ship: the best row of a report that meets conditions, and why not each of the others.

Conditions: comparisons of a field of report.json with a number or a word, joined by commas, all of which must hold:

    p90_ms<=10, top1_drop_vs_teacher<=0.02, precision!=fp32
"""

import difflib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.errors import UsageError
from toolchain.report.row import FIELDS, ReportRow
from toolchain.text_table import TextTable

NUMBERS = {name: field.better for name, field in FIELDS.items() if field.better is not None}
"""Fields with a number that can be compared, and whether more (1) or less (-1) is better."""

WORDS = tuple(name for name, field in FIELDS.items() if field.where)
"""Fields with a word that a condition may name."""

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
_SUFFIXES = {"k": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class Condition:
    """One comparison."""

    field: str
    comparison: str
    value: float | str

    def __str__(self) -> str:
        return f"{self.field}{self.comparison}{self.value if isinstance(self.value, str) else f'{self.value:g}'}"

    def unmet_by(self, row: Mapping[str, Any]) -> str | None:
        """Return why a row does not meet it, or None if it does; what is not known does not."""
        found = row.get(self.field)
        if found is None:
            return f"{self.field} is not known"
        if _COMPARISONS[self.comparison](found, self.value):
            return None
        return f"{self.field} is {found if isinstance(found, str) else f'{found:.4g}'}, not {self.shown}"

    @property
    def shown(self) -> str:
        return f"{self.comparison}{self.value if isinstance(self.value, str) else f'{self.value:g}'}"


@dataclass(frozen=True)
class Choice:
    """The answer."""

    best: ReportRow | None
    runner_up: ReportRow | None
    rejected: list[tuple[ReportRow, list[str]]]
    """Every other row of the device, each with its reasons."""

    warnings: list[str]


def conditions(text: str) -> list[Condition]:
    """Return the conditions of `--where`.

    Raises: UsageError for a field that does not exist, a comparison that makes no sense, or anything else.
    """
    return [_condition(part) for part in text.split(",") if part.strip()]


def choose_model(rows: Sequence[ReportRow], where: Sequence[Condition], by: str, device: str | None) -> Choice:
    """Return the best row `by` a field among those that meet every condition; among equals the fastest.

    Raises: UsageError if no row is of the device, or the rows are of several and none was named.
    """
    devices = sorted({str(row["device"]) for row in rows})
    if device is None and len(devices) > 1:
        raise UsageError(f"these rows are of several devices: {', '.join(devices)}; name one with --device")
    here = [row for row in rows if device is None or row["device"] == device]
    if not here:
        raise UsageError(f"--device {device}: no row is of it; there are: {', '.join(devices)}")
    _direction(by)
    reasons = {id(row): _reasons(row, where, by) for row in here}
    fit = sorted((row for row in here if not reasons[id(row)]), key=lambda row: _order(row, by))
    rejected = [(row, reasons[id(row)]) for row in here if reasons[id(row)]]
    for row in fit[1:]:
        rejected.append((row, [_behind(row, fit[0], by)]))
    return Choice(fit[0] if fit else None, fit[1] if len(fit) > 1 else None, rejected, _warnings(fit, by))


def _condition(part: str) -> Condition:
    match = _CONDITION.fullmatch(part)
    if match is None:
        raise UsageError(
            f"--where: {part.strip()!r} is no condition; write FIELD<=NUMBER, as in 'p90_ms<=10, top1>=0.3'"
        )
    field, comparison, value = match.groups()
    if field in WORDS:
        if comparison not in ("=", "==", "!="):
            raise UsageError(f"--where: {part.strip()!r}: {field} is a word; compare it with = or !=")
        return Condition(field, comparison, value.strip("'\""))
    _direction(field, WORDS)
    number, factor = (value[:-1], _SUFFIXES[value[-1]]) if value[-1] in _SUFFIXES else (value, 1.0)
    try:
        bound = float(number) * factor
    except ValueError:
        bound = float("nan")
    if bound != bound:
        percent = ", fractions are not percent: 2 % is 0.02" if value.endswith("%") else ""
        raise UsageError(f"--where: {part.strip()!r}: expected a number after {comparison}, got {value!r}{percent}")
    return Condition(field, comparison, bound)


def _direction(field: str, others: Sequence[str] = ()) -> int:
    if field not in NUMBERS:
        known = [*NUMBERS, *others]
        near = difflib.get_close_matches(field, known, 1)
        raise UsageError(
            f"no field {field!r}; " + (f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}")
        )
    return NUMBERS[field]


def _reasons(row: Mapping[str, Any], where: Sequence[Condition], by: str) -> list[str]:
    reasons = [] if row["status"] == "ok" else [f"status: {row['status']}"]
    if row["pytorch"] is not None:
        reasons.append("a reference: the checkpoint in PyTorch, which is no model that ships")
    reasons += filter(None, (condition.unmet_by(row) for condition in where))
    if row[by] is None and f"{by} is not known" not in reasons:
        reasons.append(f"{by} is not known")
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
    best, said = fit[0], []
    if best["grade"] == "C":
        flags = ", ".join(best["flags"])
        said.append(
            f"{best['name']} was measured with grade C ({flags}): measure again on a quiet machine before you ship it"
        )
    if len(fit) > 1 and by == "top1":
        low, high = best["top1_low"], fit[1]["top1_high"]
        if low is not None and high is not None and low <= high:
            said.append(f"its 95 % interval of top-1 overlaps that of the runner-up, {fit[1]['name']}")
    return said


def rejected_table(choice: Choice) -> TextTable:
    """Return why each of the other models was not chosen."""
    rows = [[str(row["name"]), "; ".join(reasons)] for row, reasons in choice.rejected]
    return TextTable(["rejected", "why"], rows)


def choice_lines(choice: Choice) -> list[str]:
    """Return a line for the best model and one for the runner-up, with what they measure and where they are."""
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
