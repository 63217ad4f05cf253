"""A row of report.json: its fields, roles and names."""

import json
from pathlib import Path
from typing import Any, TypeAlias

from toolchain.errors import ArtifactError, UsageError

Row: TypeAlias = dict[str, Any]

SCHEMA = 1
ROLES = ("teacher", "baseline", "student", "adopted", "external")
TRUSTED_GRADES = ("A", "B")

# Wong, "Points of view: Color blindness", Nature Methods 8 (2011); grey is the one to beat
ROLE_COLORS = {
    "teacher": "#0072B2",
    "baseline": "#7F7F7F",
    "student": "#D55E00",
    "adopted": "#009E73",
    "external": "#CC79A7",
}


def read_report(path: Path) -> dict[str, Any]:
    """A report.json, or the one in a folder.

    Raises: UsageError if there is none; ArtifactError if it is not one that this clipkd reads.
    """
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{file}: no such report. Write it with: clipkd report RUN")
    report = read_json(file)
    if report.get("schema") != SCHEMA or not isinstance(report.get("rows"), list):
        raise ArtifactError(f"{file}: expected a report of schema {SCHEMA}, got schema {report.get('schema')!r}")
    return report


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; NaN and infinities, which JSON does not have, are read as null."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON: {error}. Delete its folder and run the same command again") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def empty_row() -> Row:
    """Every field that a row has, unknown."""
    unknown = (
        *("name", "run", "model", "role", "runtime", "pytorch", "precision", "device", "machine", "batch", "threads"),
        "fixed_batch",
        *("p50_ms", "p50_low_ms", "p50_high_ms", "p90_ms", "p99_ms", "p50_by_process_ms"),
        *("text_p50_ms", "e2e_p50_ms", "images_per_s"),
        *("headline", "top1", "top1_low", "top1_high", "num_eval_images"),
        *(f"top1_drop_vs_{other}{part}" for other in ("teacher", "fp32") for part in ("", "_low", "_high", "_p")),
        *("accuracy", "retrieval", "min_cosine", "params_image", "params_text", "size_bytes", "peak_memory_bytes"),
        *("train_s", "reverted", "grade", "flags", "status", "pareto", "source"),
    )
    empty: Row = {"accuracy": {}, "retrieval": {}, "flags": [], "p50_by_process_ms": []}
    return dict.fromkeys(unknown) | empty | {"status": "ok", "pareto": False}


def runtime_name(row: Row) -> str | None:
    """The runtime, and of PyTorch how it ran: `pytorch eager`.  Reports written before had no such field."""
    return " ".join(filter(None, (row["runtime"], row.get("pytorch")))) or None
