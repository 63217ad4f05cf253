"""The table of `clipkd export --auto`: each runtime's candidates and why they were chosen or rejected."""

from collections.abc import Mapping
from typing import Any

from toolchain.text_table import TextTable

HEADERS = ["runtime", "precision", "verdict", "top-1 drop, pp", "p50 ms", "grade", "why"]


def choices_table(document: Mapping[str, Any]) -> TextTable:
    """Return a row for each candidate of auto.json."""
    rows = []
    for runtime, found in document["runtimes"].items():
        for row in found["candidates"]:
            drop, p50_ms = row["top1_drop_vs_fp32"], row["p50_ms"]
            around = [100 * row[f"top1_drop_vs_fp32_{end}"] for end in ("low", "high")] if drop is not None else []
            lost = "-" if drop is None else f"{100 * drop:.2f} [{around[0]:.2f}, {around[1]:.2f}]"
            took = "-" if p50_ms is None else f"{p50_ms:.4g} [{row['p50_low_ms']:.4g}, {row['p50_high_ms']:.4g}]"
            grade = " ".join(filter(None, [row["grade"] or "-", ", ".join(row["flags"])]))
            rows.append([runtime, row["precision"], row["verdict"], lost, took, grade, row["reason"]])
    return TextTable(HEADERS, rows)
