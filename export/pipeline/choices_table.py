"""Build the table of `clipkd export --auto`: each runtime's candidates and why they were chosen or rejected."""

from pathlib import Path

from export.pipeline.choose_precision import AutoDocument
from toolchain.text_table import Note, TextTable

HEADERS = ["runtime", "precision", "verdict", "top-1 drop, pp", "p50 ms", "grade", "why"]


def _candidates_table(document: AutoDocument) -> TextTable:
    rows = []
    for runtime, found in document["runtimes"].items():
        for row in found["candidates"]:
            drop, p50_ms = row["top1_drop_vs_fp32"], row["p50_ms"]
            low, high = row["top1_drop_vs_fp32_low"], row["top1_drop_vs_fp32_high"]
            lost = "-"
            if drop is not None and low is not None and high is not None:
                lost = f"{100 * drop:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
            took = "-" if p50_ms is None else f"{p50_ms:.4g} [{row['p50_low_ms']:.4g}, {row['p50_high_ms']:.4g}]"
            grade = " ".join(filter(None, [row["grade"] or "-", ", ".join(row["flags"])]))
            rows.append([runtime, row["precision"], row["verdict"], lost, took, grade, row["reason"]])
    return TextTable(HEADERS, rows)


def describe_choices(document: AutoDocument, run: Path) -> list[str | Note | TextTable]:
    """Return the model to ship in each runtime, the warnings, and the table of all candidates."""
    parts: list[str | Note | TextTable] = []
    for runtime, found in document["runtimes"].items():
        shipped = f"{found['precision']}  {run / found['model']}" if found["model"] else "nothing to ship"
        parts.append(f"{runtime}: {shipped}")
        parts += [Note(f"warning: {runtime}: {warning}") for warning in found["warnings"]]
    return [*parts, _candidates_table(document)]
