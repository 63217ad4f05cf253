"""The rows of report.json: the types of their fields, and a table of everything else about each field.

To add a field, add it to `ReportRow` and to `FIELDS` at the same position; a Column in tables.py prints it.
"""

import math
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

from toolchain.errors import ArtifactError, UsageError
from toolchain.precisions import PRECISIONS
from toolchain.report.measured import Measured, machine_name, read_json

SCHEMA = 1
ROLES = ("teacher", "baseline", "student", "adopted", "external")
GRADES = ("A", "B", "C")
TRUSTED_GRADES = ("A", "B")

# Wong, "Points of view: Color blindness", Nature Methods 8 (2011); grey is the baseline
ROLE_COLORS = {
    "teacher": "#0072B2",
    "baseline": "#7F7F7F",
    "student": "#D55E00",
    "adopted": "#009E73",
    "external": "#CC79A7",
}


class SetAccuracy(TypedDict):
    """Zero-shot accuracy on one evaluation set, as fractions."""

    top1: float | None
    low: float | None
    high: float | None
    n: int | None
    top5: float | None


class ReportRow(TypedDict):
    """A row of report.json: one model on one device.  docs/report.md explains each field."""

    name: str
    run: str | None
    model: str | None
    role: str | None
    runtime: str | None
    pytorch: str | None
    precision: str | None
    device: str | None
    machine: str | None
    batch: int | None
    threads: int | None
    fixed_batch: int | None
    p50_ms: float | None
    p50_low_ms: float | None
    p50_high_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    p50_by_process_ms: list[float]
    text_p50_ms: float | None
    e2e_p50_ms: float | None
    images_per_s: float | None
    headline: str | None
    top1: float | None
    top1_low: float | None
    top1_high: float | None
    num_eval_images: int | None
    top1_drop_vs_teacher: float | None
    top1_drop_vs_teacher_low: float | None
    top1_drop_vs_teacher_high: float | None
    top1_drop_vs_teacher_p: float | None
    top1_drop_vs_fp32: float | None
    top1_drop_vs_fp32_low: float | None
    top1_drop_vs_fp32_high: float | None
    top1_drop_vs_fp32_p: float | None
    accuracy: dict[str, SetAccuracy]
    retrieval: dict[str, dict[str, float]]
    min_cosine: dict[str, float | None] | None
    params_image: int | None
    params_text: int | None
    size_bytes: int | None
    size_image_bytes: int | None
    size_text_bytes: int | None
    vocabulary: dict[str, int] | None
    peak_memory_bytes: int | None
    train_s: float | None
    reverted: int | None
    grade: str | None
    flags: list[str]
    status: str
    pareto: bool
    source: str | None


class Report(TypedDict):
    """The content of report.json."""

    schema: int
    rows: list[ReportRow]


# --- the table of fields ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """A number, and its valid range in a table of external rows."""

    least: float = 0.0
    most: float = math.inf
    is_whole: bool = False


@dataclass(frozen=True)
class Word:
    """A text, and its valid values in a table of external rows; empty if any is valid."""

    among: tuple[str, ...] = ()


MEASURE, COUNT, FRACTION, DROP = Number(), Number(is_whole=True), Number(most=1.0), Number(least=-1.0, most=1.0)
WORD = Word()
LESS, MORE = -1, 1


@dataclass(frozen=True)
class Field:
    """A field of a row: all its properties except name and type."""

    kind: Number | Word | None = None
    """None: a list, mapping or boolean, which conditions and tables of external rows cannot use."""

    read: Callable[[Measured], Any] | None = None
    """Returns the field's value for a measured model; None: `collect` computes it by comparing rows."""

    better: int | None = None
    """LESS or MORE: the better direction of this number; None: `best` does not compare by it."""

    where: bool = False
    """True if `best --where` may use this text field; it may use every number that has `better`."""

    external: bool = False
    """True if a table of external rows may give it."""

    identity: bool = False
    """True if it identifies what was measured where: rows of two reports match if all of these agree."""

    empty: Any = None
    """Its value if it is unknown."""


def _accuracy(of: Measured) -> dict[str, SetAccuracy]:
    return {
        name: {
            "top1": scores.get("top1"),
            "low": scores.get("top1_low"),
            "high": scores.get("top1_high"),
            "n": scores.get("n"),
            "top5": scores.get("top5"),
        }
        for name, scores in of.sets.items()
    }


def _count_reverted(of: Measured) -> int | None:
    found = of.checkpoint.get("sensitivity")
    return None if found is None else len(found["reverted"])


# In the order of report.json and report.csv; `of` is the measured model.
FIELDS: dict[str, Field] = {
    "name": Field(WORD, where=True, external=True, empty=""),
    "run": Field(WORD, lambda of: of.run.as_posix()),
    "model": Field(WORD, lambda of: of.manifest.relative_to(of.run).parts[1], where=True),
    "role": Field(Word(ROLES), lambda of: of.summary.get("role"), where=True, external=True, identity=True),
    "runtime": Field(WORD, lambda of: of.summary.get("runtime"), where=True, external=True, identity=True),
    "pytorch": Field(WORD, lambda of: of.summary.get("pytorch"), identity=True),
    "precision": Field(
        Word(tuple(PRECISIONS)), lambda of: of.summary.get("precision"), where=True, external=True, identity=True
    ),
    "device": Field(
        WORD, lambda of: of.profile.get("device") or (of.folder and of.folder.name), external=True, identity=True
    ),
    "machine": Field(
        WORD, lambda of: machine_name(of.profile.get("machine")), where=True, external=True, identity=True
    ),
    "batch": Field(COUNT, lambda of: of.profile.get("batch"), LESS, external=True, identity=True),
    "threads": Field(COUNT, lambda of: of.profile.get("threads"), LESS, external=True),
    "fixed_batch": Field(COUNT, lambda of: of.summary.get("batch")),
    "p50_ms": Field(MEASURE, lambda of: of.image.get("p50_ms"), LESS, external=True),
    "p50_low_ms": Field(MEASURE, lambda of: of.image.get("p50_low_ms"), external=True),
    "p50_high_ms": Field(MEASURE, lambda of: of.image.get("p50_high_ms"), external=True),
    "p90_ms": Field(MEASURE, lambda of: of.image.get("p90_ms"), LESS, external=True),
    "p99_ms": Field(MEASURE, lambda of: of.image.get("p99_ms"), LESS, external=True),
    "p50_by_process_ms": Field(None, lambda of: of.image.get("p50_by_process_ms") or [], empty=[]),
    "text_p50_ms": Field(MEASURE, lambda of: of.text.get("p50_ms"), LESS, external=True),
    "e2e_p50_ms": Field(MEASURE, lambda of: of.profile.get("e2e_p50_ms"), LESS, external=True),
    "images_per_s": Field(MEASURE, lambda of: of.profile.get("images_per_s"), MORE, external=True),
    "headline": Field(WORD, lambda of: of.evaluation.get("headline"), where=True, external=True, identity=True),
    "top1": Field(FRACTION, lambda of: of.scores.get("top1"), MORE, external=True),
    "top1_low": Field(FRACTION, lambda of: of.scores.get("top1_low"), MORE, external=True),
    "top1_high": Field(FRACTION, lambda of: of.scores.get("top1_high"), external=True),
    "num_eval_images": Field(COUNT, lambda of: of.scores.get("n"), MORE, external=True),
    "top1_drop_vs_teacher": Field(DROP, better=LESS, external=True),
    "top1_drop_vs_teacher_low": Field(DROP),
    "top1_drop_vs_teacher_high": Field(DROP),
    "top1_drop_vs_teacher_p": Field(FRACTION),
    "top1_drop_vs_fp32": Field(DROP, better=LESS, external=True),
    "top1_drop_vs_fp32_low": Field(DROP),
    "top1_drop_vs_fp32_high": Field(DROP),
    "top1_drop_vs_fp32_p": Field(FRACTION),
    "accuracy": Field(None, _accuracy, empty={}),
    "retrieval": Field(
        None, lambda of: {name: scores.get("retrieval") or {} for name, scores in of.sets.items()}, empty={}
    ),
    "min_cosine": Field(
        None, lambda of: {tower: (of.parity.get(tower) or {}).get("min_cosine") for tower in ("image", "text")}
    ),
    "params_image": Field(COUNT, lambda of: of.summary.get("params_image"), LESS, external=True),
    "params_text": Field(COUNT, lambda of: of.summary.get("params_text"), LESS, external=True),
    "size_bytes": Field(
        COUNT, lambda of: of.profile.get("size_bytes") or of.summary.get("size_bytes"), LESS, external=True
    ),
    "size_image_bytes": Field(
        COUNT,
        lambda of: of.profile.get("size_image_bytes") or of.summary.get("size_image_bytes"),
        LESS,
        external=True,
    ),
    "size_text_bytes": Field(
        COUNT, lambda of: of.profile.get("size_text_bytes") or of.summary.get("size_text_bytes"), LESS, external=True
    ),
    "vocabulary": Field(None, lambda of: of.checkpoint.get("vocabulary")),
    "peak_memory_bytes": Field(COUNT, lambda of: of.profile.get("peak_memory_bytes"), LESS, external=True),
    "train_s": Field(MEASURE, lambda of: of.checkpoint.get("train_s"), LESS, external=True),
    "reverted": Field(COUNT, _count_reverted),
    "grade": Field(Word(GRADES), lambda of: of.profile.get("grade"), where=True, external=True),
    "flags": Field(None, lambda of: list(of.profile.get("flags") or []), empty=[]),
    "status": Field(WORD, lambda of: of.status, empty="ok"),
    "pareto": Field(None, empty=False),
    "source": Field(WORD, lambda of: of.manifest.relative_to(of.run).as_posix()),
}


def read_row(measured: Measured) -> ReportRow:
    """Return the row of a measured model, without the fields that come from comparing rows."""
    return complete_row({name: field.read(measured) for name, field in FIELDS.items() if field.read is not None})


def complete_row(known: Mapping[str, Any]) -> ReportRow:
    """Return a row with the known fields; every other field gets its empty value."""
    return cast(ReportRow, {name: copy(field.empty) for name, field in FIELDS.items()} | dict(known))


def read_report(path: Path) -> Report:
    """Return the content of a report.json, given its path or its folder.

    Raises: UsageError if there is none; ArtifactError if its schema is not supported.
    """
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{file}: no such report. Write one with: clipkd report RUN")
    try:
        report = read_json(file)
    except ArtifactError as error:
        raise ArtifactError(f"{error}. Expected the report.json that clipkd report writes") from None
    if report.get("schema") != SCHEMA or not isinstance(report.get("rows"), list):
        raise ArtifactError(f"{file}: expected a report of schema {SCHEMA}, got schema {report.get('schema')!r}")
    return cast(Report, report)


def measured_folder(row: ReportRow) -> Path | None:
    """Return the directory of a row's measurements; None for a row from elsewhere."""
    return None if row["run"] is None else Path(row["run"]) / "measured" / str(row["model"]) / str(row["device"])


def runtime_name(row: ReportRow) -> str | None:
    """Return the runtime, for PyTorch with its mode: `pytorch eager`.  Older reports have no `pytorch` field."""
    return " ".join(filter(None, (row["runtime"], row.get("pytorch")))) or None
