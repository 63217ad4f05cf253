"""Rows for a report that clipkd did not measure: a table of the user's, and the times that trtexec exports.

A table is CSV with a header, or JSON: a list of objects.  A row needs `name` and `device`; every other field of
report.json is optional and means what it means there (milliseconds, bytes, fractions, never percent).  In place of
latencies it may have `trtexec`: the file that trtexec --exportTimes wrote, relative to the table; p50_ms, p90_ms and
p99_ms are then of its GPU compute times.  Such a row's role is `external` unless it says otherwise.
"""

import csv
import difflib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.errors import UsageError
from toolchain.precisions import PRECISIONS
from toolchain.report.row import ROLES, Row

_TEXTS = ("name", "role", "runtime", "precision", "device", "machine", "headline", "grade")
_COUNTS = ("batch", "threads", "num_eval_images", "params_image", "params_text", "size_bytes", "peak_memory_bytes")
_FRACTIONS = ("top1", "top1_low", "top1_high")
_DROPS = ("top1_drop_vs_teacher", "top1_drop_vs_fp32")
_TIMES = ("p50_ms", "p50_low_ms", "p50_high_ms", "p90_ms", "p99_ms", "text_p50_ms", "e2e_p50_ms")
_NUMBERS = (*_COUNTS, *_FRACTIONS, *_DROPS, *_TIMES, "images_per_s", "train_s")
_FIELDS = (*_TEXTS, *_NUMBERS, "trtexec")
_MIN_SAMPLES = {"p50_ms": 1, "p90_ms": 64, "p99_ms": 662}  # as export/profiling/protocol.py has them


def external_rows(path: Path) -> list[Row]:
    """The rows of a table.

    Raises: UsageError for anything in it that is not understood, naming the row and the field.
    """
    rows = []
    for number, raw in enumerate(_raw_rows(path), 1):
        where = f"{path}: row {number}"
        given = {key: value for key, value in raw.items() if value not in (None, "")}
        for key in given:
            if key not in _FIELDS:
                near = difflib.get_close_matches(str(key), _FIELDS, 1)
                hint = f"did you mean {near[0]}?" if near else f"known are: {', '.join(_FIELDS)}"
                raise UsageError(f"{where}: unknown field {key!r}; {hint}")
        for key in ("name", "device"):
            if key not in given:
                raise UsageError(f"{where}: no {key}; a row needs name and device")
        row: Row = {key: str(given[key]) for key in _TEXTS if key in given}
        row |= {key: _number(where, key, given[key]) for key in _NUMBERS if key in given}
        row["role"] = row.get("role", "external")
        for key, known in (("role", ROLES), ("precision", PRECISIONS), ("grade", ("A", "B", "C"))):
            if row.get(key) not in (None, *known):
                raise UsageError(f"{where}: {key} {row[key]!r}; expected one of {', '.join(known)}")
        if "trtexec" in given:
            row |= {"runtime": "tensorrt"} | _trtexec_times(path.parent / str(given["trtexec"]), where) | row
        row["source"] = path.name
        row["batch"] = row.get("batch", 1)
        rows.append(row)
    if not rows:
        raise UsageError(f"{path}: no row in it; expected a CSV header and rows, or a JSON list of objects")
    return rows


def _raw_rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    if path.suffix == ".json":
        try:
            content = json.loads(text)
        except ValueError as error:
            raise UsageError(f"{path}: not JSON: {error}") from None
        if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
            raise UsageError(f"{path}: expected a JSON list of objects, one for each row")
        return content
    try:
        return list(csv.DictReader(io.StringIO(text, newline=""), strict=True, restkey="(more cells than the header)"))
    except csv.Error as error:
        raise UsageError(f"{path}: not CSV: {error}") from None


def _number(where: str, key: str, value: Any) -> float | int:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    is_fraction = key in _FRACTIONS or key in _DROPS
    least = -1.0 if key in _DROPS else 0.0
    if not least <= number < float("inf") or isinstance(value, bool):  # NaN is not within
        raise UsageError(f"{where}: {key} {value!r}; expected a number from {least:g}")
    if is_fraction and number > 1:
        raise UsageError(f"{where}: {key} {value!r}; expected a fraction from {least:g} to 1, and not percent")
    return int(number) if key in _COUNTS else number


def _trtexec_times(path: Path, where: str) -> Row:
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))
        times_ms = np.array([float(run["computeMs"]) for run in runs])
    except FileNotFoundError:
        raise UsageError(f"{where}: trtexec: {path}: no such file") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{where}: trtexec: {path}: expected what trtexec --exportTimes writes, a list of objects with computeMs "
            f"({type(error).__name__}: {error})"
        ) from None
    if not len(times_ms):
        raise UsageError(f"{where}: trtexec: {path}: no times in it")
    percentiles = {"p50_ms": 50, "p90_ms": 90, "p99_ms": 99}
    return {
        key: float(np.percentile(times_ms, percentile))
        for key, percentile in percentiles.items()
        if len(times_ms) >= _MIN_SAMPLES[key]
    }
