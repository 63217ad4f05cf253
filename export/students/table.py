"""The table that `clipkd students` prints."""

from collections.abc import Sequence

from export.students.documents import MeasuredStudent
from toolchain.text_table import TextTable

HEADERS = ("student", "", "p50 ms", "95 %", "params M", "GMACs", "MB", "text M", "top-1 %", "grade", "licence")


def students_table(fit: Sequence[MeasuredStudent]) -> list[TextTable | str]:
    """Return the printed table and the lines below it; a star marks a row on a Pareto front."""
    sources = list(dict.fromkeys(row["source"] for row in fit if row["source"]))
    rows = [_cells(row, sources) for row in fit]
    bench = f"{fit[0]['device']}, {fit[0]['runtime']}, {fit[0]['threads']} thread(s), batch 1"
    notes = [
        f"on {bench}, image towers alone; text M: parameters of the text tower",
        "★ Pareto front: no other row of the same precision is both as fast and as good in this column",
    ]
    if any(row["licence"] for row in fit):
        notes.append("licence: of the image tower's published weights, as timm states it; students.json names them")
    if sources:
        notes.append(
            "top-1: ImageNet zero-shot, as published for the float model; in parentheses: this row is not fp32"
        )
    notes += [f"[{number}] {source}" for number, source in enumerate(sources, 1)]
    numbers = HEADERS[2:-2]
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
        f"{row['params_text'] / 1e6:.1f}",
        worth["published_fp32_top1"],
        " ".join([row["grade"], *row["flags"]]),
        row["licence"],
    ]
