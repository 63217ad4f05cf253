"""Results of the steps of benchmarks/gpu.py: rows written as they come, the page made of them, figures that disappoint.

A step runs in a process of its own (gpu_step.py), which may be ended at any moment.  It appends each row to gpu.jsonl
as soon as it is measured; gpu.py makes gpu.md of all rows after every step.
"""

import json
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import one_line

ROWS, PAGE = "gpu.jsonl", "gpu.md"

MAX_WAITING = 0.10  # share of the time in which the GPU waits for data
MIN_SPEEDUP_CACHED = 2.0  # of ours with a cached teacher, to the straightforward loop in bf16
MIN_MFU, MFU_BATCH = 0.35, 1024  # of the measured rate of a bf16 matrix product

Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One running step: where its rows go, and how long it may take."""

    name: str
    dry: bool
    out: Path
    scratch: Path
    """A folder for what does not come back, which later steps find again."""

    deadline: float
    """The moment, by time.monotonic(), at which the process is ended."""

    @property
    def device_type(self) -> str:
        return "cpu" if self.dry else "cuda"

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def record(self, table: str, **row: Any) -> None:
        """Append one row to a table."""
        self._write({"step": self.name, "table": table, "row": row})
        print(f"{self.name}: {table}: " + ", ".join(f"{key} {_cell(value)}" for key, value in row.items()), flush=True)

    def note(self, text: str) -> None:
        """Append one line of text."""
        self._write({"step": self.name, "note": text})
        print(f"{self.name}: {text}", flush=True)

    @contextmanager
    def guard_case(self, what: str) -> Iterator[None]:
        """Record an error of one case as a check that does not hold, so that the other cases still run."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.record("problems", what=what, problem=f"{type(error).__name__}: {one_line(error)}", holds=False)

    def _write(self, line: Mapping[str, Any]) -> None:
        with (self.out / ROWS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_lines(out: Path) -> list[dict[str, Any]]:
    """Return the lines written so far; a line that the end of a process cut off is left out."""
    found = []
    path = out / ROWS
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def drop_steps(out: Path, names: Collection[str]) -> None:
    """Remove what an earlier run wrote of steps that now run again."""
    kept = [line for line in read_lines(out) if line["step"] not in names]
    (out / ROWS).write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def list_rows(lines: Iterable[Mapping[str, Any]]) -> list[Row]:
    return [line["row"] for line in lines if "row" in line]


def disappointments(row: Row) -> list[str]:
    """Return what disappoints in a row, by the rules of the module's constants."""
    found = []
    waiting = row.get("waiting")
    if waiting is not None and not waiting <= MAX_WAITING:
        found.append(f"GPU waits for data {100 * waiting:.0f} % of the time (at most {100 * MAX_WAITING:.0f} %)")
    side, speedup = str(row.get("side", "")), row.get("to_bf16_loop")
    if side.startswith("ours, cached") and speedup is not None and not speedup >= MIN_SPEEDUP_CACHED:
        found.append(f"{speedup:.2f} x the straightforward bf16 loop (at least {MIN_SPEEDUP_CACHED:g} x)")
    mfu = row.get("mfu")
    if side.startswith("ours") and row.get("batch") == MFU_BATCH and mfu is not None and not mfu >= MIN_MFU:
        found.append(f"MFU {100 * mfu:.0f} % (at least {100 * MIN_MFU:.0f} %)")
    return found + failed_checks(row)


def write_page(out: Path, heading: Iterable[str], find_flags: Callable[[Row], list[str]] = disappointments) -> None:
    """Write gpu.md: the heading, then each step with its notes and tables, and flags in the rows that have some."""
    lines = read_lines(out)
    page = [*heading, ""]
    for name in dict.fromkeys(line["step"] for line in lines):
        own = [line for line in lines if line["step"] == name]
        page += [f"## {name}", ""]
        for table in dict.fromkeys(line["table"] for line in own if "table" in line):
            page += [f"**{table}**", "", *_table(list_rows(x for x in own if x.get("table") == table), find_flags), ""]
        notes = [f"- {line['note']}" for line in own if "note" in line]
        page += [*notes, ""] if notes else []
    (out / PAGE).write_text("\n".join(page), encoding="utf-8")


def failed_checks(row: Row) -> list[str]:
    """Return the flag of a check that does not hold; in a dry run no figure counts, and so none can disappoint."""
    return ["outside its bound"] if row.get("holds") is False else []


def _table(rows: list[Row], find_flags: Callable[[Row], list[str]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    flags = ["; ".join(find_flags(row)) for row in rows]
    if any(flags):
        columns.append("flag")
        rows = [row | {"flag": flag} for row, flag in zip(rows, flags, strict=True)]
    written = [[_cell(row.get(column)) for column in columns] for row in rows]
    return [
        f"| {' | '.join(column.replace('_', ' ') for column in columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(cells)} |" for cells in written),
    ]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "/").replace("\n", " ")
