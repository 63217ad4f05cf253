"""Write report.json and its readable forms."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolchain.filesystem import replacing
from toolchain.report.collect import collect
from toolchain.report.row import Row
from toolchain.report.tables import render_csv, render_markdown


def write_report(runs: Sequence[Path], out: Path, external: Sequence[Row] = ()) -> dict[str, Any]:
    """`collect`, written to a folder as report.json, .csv, .md, .png, .svg and .html, each replaced in one step."""
    from toolchain.report.chart import render_picture
    from toolchain.report.page import render_page

    report = collect(runs, external)
    title = out.resolve().name
    contents = {
        "report.csv": render_csv(report).encode(),
        "report.md": render_markdown(report, title=title).encode(),
        "report.png": render_picture(report, "png"),
        "report.svg": render_picture(report, "svg"),
        "report.html": render_page(runs, report, title=title).encode(),
        "report.json": (json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        with replacing(out / name) as partial:
            partial.write_bytes(content)
    return report
