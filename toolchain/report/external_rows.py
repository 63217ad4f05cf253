"""Read report rows that clipkd did not measure, from a user's table and from times exported by trtexec.

A table is CSV with a header, or a JSON list of objects.  A row needs `name` and `device`; every other field of
report.json is optional and has the same meaning (milliseconds, bytes, fractions, never percent).  Instead of latencies,
a row may have `trtexec`: a file written by trtexec --exportTimes, relative to the table; p50_ms, p90_ms and p99_ms are
then percentiles of its GPU compute times.  The default role of a row is `external`.
"""

import csv
import difflib
import io
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.errors import UsageError
from toolchain.report.row import FIELDS, Number, Word
from toolchain.user_documents import InvalidDocument, decode_document, parse_json

ExternalRow = dict[str, Any]
"""The fields of a ReportRow that the table gives."""

_WORDS = {name: field.kind for name, field in FIELDS.items() if field.external and isinstance(field.kind, Word)}
_NUMBERS = {name: field.kind for name, field in FIELDS.items() if field.external and isinstance(field.kind, Number)}
_KNOWN = (*_WORDS, *_NUMBERS, "trtexec")
_MIN_SAMPLES = {"p50_ms": 1, "p90_ms": 64, "p99_ms": 662}  # the same as in export/profiling/protocol.py


def external_rows(path: Path) -> list[ExternalRow]:
    """Return the rows of a table.

    Raises: UsageError for anything invalid in it; the message gives the row and the field.
    """
    rows = [_check_row(path, f"{path}: row {number}", raw) for number, raw in enumerate(_raw_rows(path), 1)]
    if not rows:
        raise UsageError(f"{path}: no rows; expected a CSV header and rows, or a JSON list of objects")
    return rows


def _check_row(path: Path, where: str, raw: dict[str, Any]) -> ExternalRow:
    given = {key: value for key, value in raw.items() if value not in (None, "")}
    for key in given:
        if key not in _KNOWN:
            near = difflib.get_close_matches(str(key), _KNOWN, 1)
            hint = f"did you mean {near[0]}?" if near else f"known fields: {', '.join(_KNOWN)}"
            raise UsageError(f"{where}: unknown field {key!r}; {hint}")
    for key in ("name", "device"):
        if key not in given:
            raise UsageError(f"{where}: no {key}; every row needs name and device")
    row: ExternalRow = {key: str(given[key]) for key in _WORDS if key in given}
    row |= {key: _number(where, key, given[key], kind) for key, kind in _NUMBERS.items() if key in given}
    row["role"] = row.get("role", "external")
    for key, word in _WORDS.items():
        if word.among and row.get(key) not in (None, *word.among):
            raise UsageError(f"{where}: {key} {row[key]!r}; expected one of {', '.join(word.among)}")
    if "trtexec" in given:
        row |= {"runtime": "tensorrt"} | _trtexec_times(path.parent / str(given["trtexec"]), where) | row
    row["source"] = path.name
    row["batch"] = row.get("batch", 1)
    return row


def _raw_rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    if path.suffix == ".json":
        try:
            content = parse_json(text)
        except InvalidDocument as error:
            raise UsageError(f"{path}: {error}") from None
        if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
            raise UsageError(f"{path}: expected a JSON list of objects, one for each row")
        return content
    try:
        return list(csv.DictReader(io.StringIO(text, newline=""), strict=True, restkey="(more cells than the header)"))
    except csv.Error as error:
        raise UsageError(f"{path}: not CSV: {error}") from None


def _number(where: str, key: str, value: Any, kind: Number) -> float | int:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not kind.least <= number < float("inf") or isinstance(value, bool):  # NaN fails this test
        raise UsageError(f"{where}: {key} {value!r}; expected a number of at least {kind.least:g}")
    if number > kind.most:
        limits = f"{kind.least:g} to {kind.most:g}"
        raise UsageError(f"{where}: {key} {value!r}; expected a fraction from {limits}, not percent")
    return int(number) if kind.is_whole else number


def _trtexec_times(path: Path, where: str) -> dict[str, float]:
    try:
        runs = parse_json(decode_document(path.read_bytes()))
        times_ms = np.array([float(run["computeMs"]) for run in runs])
    except FileNotFoundError:
        raise UsageError(f"{where}: trtexec: {path}: no such file") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{where}: trtexec: {path}: expected the file of trtexec --exportTimes, a list of objects with computeMs "
            f"({type(error).__name__}: {error})"
        ) from None
    if not len(times_ms):
        raise UsageError(f"{where}: trtexec: {path}: it has no times")
    if not ((times_ms > 0) & (times_ms < np.inf)).all():  # False for NaN
        raise UsageError(f"{where}: trtexec: {path}: a computeMs is not a positive number")
    percentiles = {"p50_ms": 50, "p90_ms": 90, "p99_ms": 99}
    return {
        key: float(np.percentile(times_ms, percentile))
        for key, percentile in percentiles.items()
        if len(times_ms) >= _MIN_SAMPLES[key]
    }
