"""Write report.json and its readable forms."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolchain.filesystem import replacing
from toolchain.report.cached_report import report_spec, write_record
from toolchain.report.collect import collect
from toolchain.report.row import Report
from toolchain.report.tables import render_csv, render_markdown


def write_report(runs: Sequence[Path], out: Path, external: Sequence[Mapping[str, Any]] = ()) -> Report:
    """Write the report of runs to a folder as report.json, .csv, .md, .png, .svg and .html, each replaced atomically.

    A report of one run that is written to that run, without external rows, is recorded there as up to date.
    """
    from toolchain.report.chart import render_chart
    from toolchain.report.page import render_page

    is_of_its_run = not external and [run.resolve() for run in runs] == [out.resolve()]
    spec = (
        report_spec(out) if is_of_its_run else None
    )  # before reading, so that a later change makes the report outdated
    report = collect(runs, external)
    title = out.resolve().name
    contents = {
        "report.csv": render_csv(report).encode(),
        "report.md": render_markdown(report, title=title).encode(),
        "report.png": render_chart(report, "png"),
        "report.svg": render_chart(report, "svg"),
        "report.html": render_page(runs, report, title=title).encode(),
        "report.json": (json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        with replacing(out / name) as partial:
            partial.write_bytes(content)
    if spec is not None:
        write_record(spec, contents)
    return report
