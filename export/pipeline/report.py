"""Write the report of a run as its last stage."""

import json
import math
from pathlib import Path
from typing import Any

from toolchain.progress import Screen
from toolchain.stage import MANIFEST, Stage


def report_run(out: Path, measured: dict[str, Stage], screen: Screen) -> dict[str, Any]:
    """report.json and its readable forms, written again only when something measured is new."""
    path = out / "report.json"
    screen.starts("report")
    # of kits alone nothing was measured: their report is written each time
    newest = max(((stage.path / MANIFEST).stat().st_mtime_ns for stage in measured.values()), default=math.inf)
    files = [path.with_suffix(suffix) for suffix in (".json", ".csv", ".md", ".png", ".svg", ".html")]
    if all(file.exists() and file.stat().st_mtime_ns >= newest for file in files):
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        screen.line("report", "cached")
        return document
    from toolchain.report.write import write_report

    document = write_report([out], out)
    screen.line("report", "written")
    return document
