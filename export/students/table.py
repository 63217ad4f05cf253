"""The table that `clipkd students` prints."""

from collections.abc import Sequence

from export.students.documents import MeasuredStudent
from toolchain.text_table import TextTable

HEADERS = ("student", "", "p50 ms", "95 %", "params M", "GMACs", "MB", "top-1 %", "grade")


def students_table(fit: Sequence[MeasuredStudent]) -> list[TextTable | str]:
    """Return the printed table and the lines below it; a star marks a row on a Pareto front."""
    sources = list(dict.fromkeys(row["source"] for row in fit if row["source"]))
    rows = [_cells(row, sources) for row in fit]
    notes = [
        f"on {fit[0]['device']}, {fit[0]['runtime']}, {fit[0]['threads']} thread(s), batch 1, image towers alone",
        "★ Pareto front: no other row of the same precision is both as fast and as good in this column",
    ]
    if sources:
        notes.append(
            "top-1: ImageNet zero-shot, as published for the float model; in parentheses: this row is not fp32"
        )
    notes += [f"[{number}] {source}" for number, source in enumerate(sources, 1)]
    numbers = HEADERS[2:-1]
    return [TextTable(HEADERS, rows, right=numbers, no_wrap=["student", *numbers], dense=True), *notes]


def _cells(row: MeasuredStudent, sources: Sequence[str]) -> list[str]:
    top1 = "" if row["published_fp32_top1"] is None else f"{100 * row['published_fp32_top1']:.1f}"
    if top1:
        top1 = f"{top1 if row['precision'] == 'fp32' else f'({top1})'} [{sources.index(row['source']) + 1}]"
    shown = {
        "params_image": f"{row['params_image'] / 1e6:.2f}",
        "gmacs": f"{row['gmacs']:.2f}",
        "published_fp32_top1": top1,
    }
    worth = {field: text + (" ★" if field in row["front"] else "  ") for field, text in shown.items()}
    return [
        row["name"],
        row["precision"],
        f"{row['p50_ms']:.3g}",
        f"{row['p50_low_ms']:.3g}-{row['p50_high_ms']:.3g}",
        worth["params_image"],
        worth["gmacs"],
        f"{row['size_bytes'] / 1e6:.3g}",
        worth["published_fp32_top1"],
        " ".join([row["grade"], *row["flags"]]),
    ]
