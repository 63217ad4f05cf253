"""Implement `clipkd students`: measure candidates, select those that are fast enough, and write the results."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.devices.registry import Device
from export.students.candidates import Candidate
from export.students.chart import render_students
from export.students.documents import MeasuredStudent, StudentRow, is_measured
from export.students.measure import STUDENT_PRECISIONS, STUDENT_RUNTIMES, measure_students
from toolchain.errors import ClipkdError, GateError, UsageError
from toolchain.filesystem import write_json
from toolchain.progress import Progress, no_progress


@dataclass(frozen=True)
class Students:
    """Measured candidates, fastest first."""

    fit: list[MeasuredStudent]
    """Those that are fast enough."""

    failed: list[StudentRow]
    """Those that could not be measured."""

    chart: Path
    problem: ClipkdError | None
    """The error if no candidate was measured or none is fast enough."""

    @property
    def rows(self) -> list[StudentRow]:
        """The content of students.json."""
        return [*self.fit, *self.failed]


def parse_precisions(text: str) -> list[str]:
    """Return the precisions of a comma-separated list without duplicates.

    Raises:
        UsageError: the list is empty, or has a precision that untrained students cannot be measured in.
    """
    precisions = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for part in precisions or [""]:
        if part not in STUDENT_PRECISIONS:
            raise UsageError(
                f"--precision '{text}': expected one or more of {', '.join(STUDENT_PRECISIONS)}, got {part!r}"
            )
    return precisions


def require_runtime(name: str | None) -> None:
    """Check that untrained students can be measured in a runtime.

    Raises:
        UsageError: they cannot.
    """
    if name not in (None, *STUDENT_RUNTIMES):
        raise UsageError(f"--runtime {name}: expected one of {', '.join(STUDENT_RUNTIMES)}")


def choose_students(
    wanted: Sequence[Candidate],
    precisions: Sequence[str],
    *,
    device: Device | str = "cpu",
    runtime: str | None = None,
    threads: int | None = None,
    max_ms: float | None = None,
    out: Path,
    progress: Progress = no_progress,
) -> Students:
    """Measure as in `measure_students`, write students.json and students.png into `out`, and return the results.

    A student fits if its median latency at batch 1 is at most `max_ms`.
    """
    rows = measure_students(wanted, precisions, device=device, runtime=runtime, threads=threads, progress=progress)
    measured = [row for row in rows if is_measured(row)]
    failed = [row for row in rows if not is_measured(row)]
    fit = [row for row in measured if max_ms is None or row["p50_ms"] <= max_ms]
    name = device.name if isinstance(device, Device) else device
    problem: ClipkdError | None = None
    if not measured:
        problem = ClipkdError(f"no candidate could be measured on {name}: {failed[0]['status']}")
    elif not fit:
        problem = GateError(f"no candidate takes at most {max_ms:g} ms on {name}")
    students = Students(fit, failed, out / "students.png", problem)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "students.json", students.rows)
    students.chart.write_bytes(render_students(fit))
    return students
