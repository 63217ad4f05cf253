"""The table that `clipkd profile` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from export.profiling.documents import FailedRow, ProfileDocument, ProfileRow, is_measured
from export.profiling.summary import MIN_SAMPLES_P90, MIN_SAMPLES_P99
from toolchain.significance import differ_significantly
from toolchain.text_table import Note, TextTable

_REASON_CHARACTERS = 100  # shown in the table; the error has the full text


def profiles_table(rows: Sequence[ProfileRow | FailedRow]) -> TextTable:
    """Return the printed table.

    Times are milliseconds to three digits; a percentile with too few samples shows how many it needs.
    """
    headers = ["model", "p50 ms [95 %]", "p90 ms", "p99 ms", "text\np50 ms", "end to\nend ms"]
    headers += ["images/s\n(batch)", "load,\nfirst ms", "peak\nMB", "grade"]
    timed = [row for row in rows if is_measured(row)]
    headers += ["p50 to\nthe first"] if len(timed) > 1 else []
    all_ok = len(timed) == len(rows)
    names = [Path(row["model"]).name for row in rows]
    if len(set(names)) < len(names):
        names = [row["model"] for row in rows]
    cells = [
        [*_cells(row), *([_compare_to_first(timed[0], row)] if len(timed) > 1 else [])]
        if is_measured(row)
        else ["-"] * (len(headers) - 1)
        for row in rows
    ]
    status = [[] if all_ok else [_reason(row)] for row in rows]
    return TextTable(
        headers + ([] if all_ok else ["status"]),
        [[name, *measured, *reason] for name, measured, reason in zip(names, cells, status, strict=True)],
        no_wrap=["p50 ms [95 %]", "p50 to\nthe first"],
    )


def clocks_note(rows: Sequence[ProfileRow | FailedRow]) -> list[Note]:
    """Return a note with the commands that lock the clocks, if any clock is not locked."""
    commands = dict.fromkeys(command for row in rows if is_measured(row) for command in row["to_lock_clocks"])
    text = "Clocks are not locked, so no grade is A. clipkd never locks them; these commands do:"
    return [Note("\n".join((text, *commands)))] if commands else []


def _reason(row: ProfileRow | FailedRow) -> str:
    """Return the beginning of a status, without the model's name, which the row already shows."""
    reason = row["status"].partition("\n")[0].removeprefix(row["model"]).lstrip("/: ")
    return reason if len(reason) <= _REASON_CHARACTERS else f"{reason[:_REASON_CHARACTERS]}…"


def _cells(found: ProfileDocument) -> list[str]:
    image, sweep = found["image"], found["sweep"]
    percentiles = (image["p90_ms"], MIN_SAMPLES_P90), (image["p99_ms"], MIN_SAMPLES_P99)
    return [
        f"{format_ms(image['p50_ms'])} [{format_ms(image['p50_low_ms'])}, {format_ms(image['p50_high_ms'])}]",
        *(f"n<{floor}" if ms is None else format_ms(ms) for ms, floor in percentiles),
        format_ms(found["text"]["p50_ms"]),
        "-" if found["e2e_p50_ms"] is None else format_ms(found["e2e_p50_ms"]),
        f"{found['images_per_s']:,.0f} ({max(sweep, key=sweep.__getitem__)})",
        f"{format_ms(image['load_ms'])}, {format_ms(image['first_ms'])}",
        f"{found['peak_memory_bytes'] / 1e6:,.0f}",
        " ".join([found["grade"], *found["flags"]]),
    ]


def _compare_to_first(first: ProfileDocument, row: ProfileDocument) -> str:
    """Return the ratio of the two p50, marked if the difference is not significant."""
    if row is first:
        return "-"
    ours, theirs = row["image"], first["image"]
    in_turns = row.get("call") == first.get("call") is not None
    apart = differ_significantly(theirs["p50_by_process_ms"], ours["p50_by_process_ms"], in_turns=in_turns)
    return f"{ours['p50_ms'] / theirs['p50_ms']:.2f}{'' if apart else ' (not significant)'}"


def format_ms(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"
