"""The findings of a report: what distillation, compression and quantization bought and cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from toolchain.report.pareto import front_groups
from toolchain.report.row import Row
from toolchain.report.units import duration, format_megabytes, format_number, format_percent, or_dash
from toolchain.runtimes import runtime_title


@dataclass(frozen=True)
class Finding:
    """One sentence a reader came for."""

    title: str
    value: str
    detail: str


def findings(rows: Sequence[Row]) -> list[Finding]:
    """What distillation, the smaller model and quantization bought and cost, as far as the rows of one run can tell; of
    several the last that has a student."""
    for comparable in front_groups(rows).values():
        runs = [row["run"] for row in comparable if row["role"] == "student" and row["run"] is not None]
        group = [row for row in comparable if row["run"] in runs[-1:]]  # one run's: others have weights of their own
        made = {(row["runtime"], row["role"], row["precision"]): row for row in group if row["pytorch"] is None}
        eager = next((row for row in group if row["pytorch"] == "eager"), None)
        runtimes = list(dict.fromkeys(runtime for runtime, *_ in made))
        # roles are compared in the runtime that has most of them: only what ships is exported for every one
        main = max(runtimes, key=lambda runtime: sum(key[0] == runtime for key in made), default=None)
        teacher, baseline, student = (made.get((main, role, "fp32")) for role in ("teacher", "baseline", "student"))
        pairs = [
            (_distillation, baseline, student),
            (_compression, teacher, student),
            (_deployment, eager, student),
            *(
                (_quantization, made.get((runtime, "student", "fp32")), made.get((runtime, "student", "int8")))
                for runtime in runtimes
            ),
        ]
        found = [state(before, after) for state, before, after in pairs if before is not None and after is not None]
        if found:
            return found
    return []


def _distillation(baseline: Row, student: Row) -> Finding:
    times = f"{or_dash(student['train_s'], duration)} of training instead of {or_dash(baseline['train_s'], duration)}"
    return Finding(
        "Distillation",
        f"{100 * (student['top1'] - baseline['top1']):+.1f} points",
        f"{format_percent(student['top1'])} % top-1 instead of {format_percent(baseline['top1'])} %"
        f"{_overlap(baseline, student, 'top1', '')}, for {times}",
    )


def _compression(teacher: Row, student: Row) -> Finding:
    return Finding(
        "Student against teacher",
        _speed(teacher, student),
        f"{format_number(student['p50_ms'])} ms instead of {format_number(teacher['p50_ms'])} ms"
        f"{_overlap(teacher, student, 'p50', '_ms')}{_smaller(teacher, student)}, "
        f"{format_percent(student['top1'])} % top-1 instead of {format_percent(teacher['top1'])} %",
    )


def _deployment(eager: Row, exported: Row) -> Finding:
    return Finding(
        f"{runtime_title(exported['runtime'])} against PyTorch eager",
        _speed(eager, exported),
        f"{format_number(exported['p50_ms'])} ms instead of {format_number(eager['p50_ms'])} ms"
        f"{_overlap(eager, exported, 'p50', '_ms')}, both in fp32, with the same weights",
    )


def _quantization(fp32: Row, int8: Row) -> Finding:
    return Finding(
        f"int8 against fp32, {runtime_title(int8['runtime'])}",
        _speed(fp32, int8),
        f"{format_number(int8['p50_ms'])} ms instead of {format_number(fp32['p50_ms'])} ms"
        f"{_overlap(fp32, int8, 'p50', '_ms')}{_smaller(fp32, int8)}, "
        f"{format_percent(int8['top1'])} % top-1 instead of {format_percent(fp32['top1'])} %",
    )


def _speed(before: Row, after: Row) -> str:
    ratio = before["p50_ms"] / after["p50_ms"]
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def _smaller(before: Row, after: Row) -> str:
    if not before["size_bytes"] or not after["size_bytes"]:
        return ""
    return f", {format_megabytes(after['size_bytes'])} MB instead of {format_megabytes(before['size_bytes'])} MB"


def _overlap(first: Row, second: Row, key: str, unit: str) -> str:
    """Says so where two intervals do not tell two rows apart."""
    limits = [row[f"{key}_{end}{unit}"] for row in (first, second) for end in ("low", "high")]
    if None in limits:
        return ""
    return " (intervals overlap)" if limits[0] <= limits[3] and limits[2] <= limits[1] else ""
