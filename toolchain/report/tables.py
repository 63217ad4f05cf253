"""The tables of a report: terminal, CSV and Markdown."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.report.findings import findings
from toolchain.report.row import Report, ReportRow, runtime_name
from toolchain.report.units import (
    duration,
    format_count,
    format_interval,
    format_megabytes,
    format_number,
    format_percent,
    format_points,
    or_dash,
)
from toolchain.text_table import TextTable


@dataclass(frozen=True)
class Column:
    """One column of the printed table: its header, its text, and its sort key (None sorts last)."""

    header: str
    text: Callable[[ReportRow], str]
    sort_key: Callable[[ReportRow], float | str | None]


def terminal_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return headers and cells of the printed table."""
    shown = columns(report["rows"])
    return [column.header for column in shown], [[column.text(row) for column in shown] for row in report["rows"]]


def terminal_table(report: Report) -> TextTable:
    """Return the terminal's table, without the runtime and precision columns if the names contain both."""
    headers, rows = terminal_rows(report)
    if len({row["runtime"] for row in report["rows"]}) == 1:  # the names end in the precision
        kept = [index for index, header in enumerate(headers) if header not in ("runtime", "precision")]
        headers, rows = [headers[index] for index in kept], [[row[index] for index in kept] for row in rows]
    return TextTable(headers, rows)


# --- words -----------------------------------------------------------------------------------------------------------


def columns(rows: Sequence[ReportRow]) -> list[Column]:
    """Return the columns of the printed table; `status` is included only if some row is not ok.

    Fractions are printed as percent only here.
    """
    headlines = {row["headline"] for row in rows if row["headline"]}
    top1 = f"{headlines.pop()} top-1" if len(headlines) == 1 else "top-1"

    def grade(row: ReportRow) -> str:
        flags = ", ".join(row["flags"] + [f"{row['reverted']} layers in float"] * bool(row["reverted"]))
        return " ".join(filter(None, [row["grade"] or "", f"({flags})" if flags else ""])) or or_dash(None)

    shown = [
        Column("name", lambda row: str(row["name"]), lambda row: row["name"]),
        Column("runtime", lambda row: or_dash(runtime_name(row)), runtime_name),
        Column("precision", lambda row: or_dash(row["precision"]), lambda row: row["precision"]),
        Column("p50 ms", lambda row: format_interval(row, "p50", "_ms", format_number), lambda row: row["p50_ms"]),
        Column("images/s", lambda row: or_dash(row["images_per_s"], format_count), lambda row: row["images_per_s"]),
        Column("size MB", lambda row: or_dash(row["size_bytes"], format_megabytes), lambda row: row["size_bytes"]),
        Column(f"{top1} %", lambda row: format_interval(row, "top1", "", format_percent), lambda row: row["top1"]),
        Column(
            "drop vs teacher",
            lambda row: or_dash(row["top1_drop_vs_teacher"], format_points),
            lambda row: row["top1_drop_vs_teacher"],
        ),
        Column("train time", lambda row: or_dash(row["train_s"], duration), lambda row: row["train_s"]),
        Column("grade", grade, lambda row: row["grade"]),
        Column("front", lambda row: "★" if row["pareto"] else "", lambda row: 0.0 if row["pareto"] else 1.0),
    ]
    if any(row["status"] != "ok" for row in rows):
        shown.append(Column("status", lambda row: str(row["status"]), lambda row: row["status"]))
    return shown


# --- files -----------------------------------------------------------------------------------------------------------


def render_csv(report: Report) -> str:
    """Return the rows as CSV, nested fields as dotted columns (`accuracy.stix.top1`), flags joined by semicolons."""
    flat_rows = [_flatten(row) for row in report["rows"]]
    fields = list(dict.fromkeys(field for row in flat_rows for field in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat_rows)
    return text.getvalue()


def _flatten(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = ";".join(map(str, value)) if isinstance(value, list) else value
    return flat


def render_markdown(report: Report, *, title: str) -> str:
    """Return findings and tables as Markdown."""
    rows = report["rows"]
    parts = [f"# {title}", "![Accuracy against latency](report.png)"]
    found = findings(rows)
    if found:
        parts.append("\n".join(f"- **{item.title}: {item.value}.** {item.detail}." for item in found))
    parts.append(_markdown_table(*terminal_rows(report)))
    parts.append(READING)
    headers, cells = set_rows(rows)
    if cells:
        parts += ["## Every evaluation set", _markdown_table(headers, cells)]
    return "\n\n".join(parts) + "\n"


READING = (
    "p50 is the median latency of the image tower at the given batch size, with inputs in memory; square brackets are "
    "95 % intervals. Accuracy is measured on the exported model in its own runtime. A star marks the Pareto front of "
    "the device: no other model is both faster and more accurate. The train time of an int8 row is that of its "
    "quantization alone. Grade A: clocks were locked; B: the measurement was stable; C: it was noisy, for the reasons "
    "listed. The front uses rows of grade A and B if there are any. A PyTorch row is the checkpoint as open_clip runs "
    "it: a reference, never on the front, because it does not ship."
)


def set_rows(rows: Sequence[ReportRow]) -> tuple[list[str], list[list[str]]]:
    """Return one line per row and evaluation set: zero-shot accuracy and retrieval."""
    recalls = ("text_to_image_r1", "text_to_image_r5", "image_to_text_r1", "image_to_text_r5")
    headers = ["name", "set", "n", "top-1 %", "top-5 %", "text to image R@1 %", "R@5 %", "image to text R@1 %", "R@5 %"]
    cells = []
    for row in rows:
        for set_name, accuracy in row["accuracy"].items():
            interval = {"top1": accuracy["top1"], "top1_low": accuracy["low"], "top1_high": accuracy["high"]}
            # in a set with one image of each class, the texts are the class names
            retrieval = {
                key.replace("name", "text"): value for key, value in row["retrieval"].get(set_name, {}).items()
            }
            cells.append(
                [
                    str(row["name"]),
                    str(set_name),
                    or_dash(accuracy["n"], format_count),
                    format_interval(interval, "top1", "", format_percent),
                    or_dash(accuracy["top5"], format_percent),
                    *(or_dash(retrieval.get(recall), format_percent) for recall in recalls),
                ]
            )
    return headers, cells


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(headers), line(["---"] * len(headers)), *(line(row) for row in rows)])
