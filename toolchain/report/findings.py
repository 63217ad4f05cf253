"""The findings of a report: gains and costs of distillation, compression and quantization."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.report.pareto import front_groups, point
from toolchain.report.row import ReportRow
from toolchain.report.units import duration, format_megabytes, format_number, format_percent, or_dash
from toolchain.runtimes import runtime_title


@dataclass(frozen=True)
class Finding:
    """One result of the runs, in one sentence."""

    title: str
    value: str
    detail: str


def findings(rows: Sequence[ReportRow]) -> list[Finding]:
    """Return the gains and costs of distillation, of the smaller model and of quantization that the rows of a run show.

    If there are several runs, the last one that has a student is used.
    """
    for comparable in front_groups(rows).values():
        runs = [row["run"] for row in comparable if row["role"] == "student" and row["run"] is not None]
        group = [row for row in comparable if row["run"] in runs[-1:]]  # one run's rows: other runs have other weights
        by_variant = {(row["runtime"], row["role"], row["precision"]): row for row in group if row["pytorch"] is None}
        eager = next((row for row in group if row["pytorch"] == "eager"), None)
        runtimes = list(dict.fromkeys(runtime for runtime, *_ in by_variant))
        # compare roles in the runtime that has the most: only the shipped model is exported for every runtime
        main = max(runtimes, key=lambda runtime: sum(key[0] == runtime for key in by_variant), default=None)
        teacher, baseline, student = (
            by_variant.get((main, role, "fp32")) for role in ("teacher", "baseline", "student")
        )
        pairs = [
            (_distillation, baseline, student),
            (_compression, teacher, student),
            (_deployment, eager, student),
            *(
                (
                    _quantization,
                    by_variant.get((runtime, "student", "fp32")),
                    by_variant.get((runtime, "student", "int8")),
                )
                for runtime in runtimes
            ),
        ]
        found = [state(before, after) for state, before, after in pairs if before is not None and after is not None]
        if found:
            return found + _vocabulary(rows)
    return _vocabulary(rows)


def _vocabulary(rows: Sequence[ReportRow]) -> list[Finding]:
    """Return the gain of a vocabulary that was cut, of the last run that has one."""
    cut = [row for row in rows if row.get("vocabulary") and row["precision"] == "fp32" and row["params_text"]]
    if not cut:
        return []
    row, found = cut[-1], cut[-1]["vocabulary"]
    assert found is not None
    assert row["params_text"] is not None
    whole = row["params_text"] + found["removed_params"]
    model = "adopted model" if row["role"] == "adopted" else row["role"]
    size = "" if row["size_text_bytes"] is None else f", in {format_megabytes(row['size_text_bytes'])} MB"
    return [
        Finding(
            "Vocabulary",
            f"{whole / row['params_text']:.2f}x smaller",
            f"{found['tokens']:,} of {found['of']:,} tokens: the text tower of the {model} has "
            f"{row['params_text']:,} parameters instead of {whole:,}{size}",
        )
    ]


def _distillation(baseline: ReportRow, student: ReportRow) -> Finding:
    (_, old_top1), (_, top1) = point(baseline), point(student)
    times = f"{or_dash(student['train_s'], duration)} of training instead of {or_dash(baseline['train_s'], duration)}"
    return Finding(
        "Distillation",
        f"{100 * (top1 - old_top1):+.1f} points",
        f"{format_percent(top1)} % top-1 instead of {format_percent(old_top1)} %"
        f"{_overlap(baseline, student, 'top1', '')}, for {times}",
    )


def _compression(teacher: ReportRow, student: ReportRow) -> Finding:
    detail = f"{_latencies(teacher, student)}{_smaller(teacher, student)}, {_accuracies(teacher, student)}"
    return Finding("Student against teacher", _speed(teacher, student), detail)


def _deployment(eager: ReportRow, exported: ReportRow) -> Finding:
    return Finding(
        f"{_runtime(exported)} against PyTorch eager",
        _speed(eager, exported),
        f"{_latencies(eager, exported)}, both in fp32, with the same weights",
    )


def _quantization(fp32: ReportRow, int8: ReportRow) -> Finding:
    detail = f"{_latencies(fp32, int8)}{_smaller(fp32, int8)}, {_accuracies(fp32, int8)}"
    return Finding(f"int8 against fp32, {_runtime(int8)}", _speed(fp32, int8), detail)


def _runtime(row: ReportRow) -> str:
    return runtime_title(str(row["runtime"]))


def _latencies(before: ReportRow, after: ReportRow) -> str:
    (old_ms, _), (new_ms, _) = point(before), point(after)
    overlap = _overlap(before, after, "p50", "_ms")
    return f"{format_number(new_ms)} ms instead of {format_number(old_ms)} ms{overlap}"


def _accuracies(before: ReportRow, after: ReportRow) -> str:
    (_, old_top1), (_, new_top1) = point(before), point(after)
    return f"{format_percent(new_top1)} % top-1 instead of {format_percent(old_top1)} %"


def _speed(before: ReportRow, after: ReportRow) -> str:
    (old_ms, _), (new_ms, _) = point(before), point(after)
    ratio = old_ms / new_ms
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def _smaller(before: ReportRow, after: ReportRow) -> str:
    if not before["size_bytes"] or not after["size_bytes"]:
        return ""
    return f", {format_megabytes(after['size_bytes'])} MB instead of {format_megabytes(before['size_bytes'])} MB"


def _overlap(first: Mapping[str, Any], second: Mapping[str, Any], key: str, unit: str) -> str:
    """Return a remark if the intervals of two rows overlap."""
    limits = [row[f"{key}_{end}{unit}"] for row in (first, second) for end in ("low", "high")]
    if None in limits:
        return ""
    return " (intervals overlap)" if limits[0] <= limits[3] and limits[2] <= limits[1] else ""
