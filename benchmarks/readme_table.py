"""Write the quickstart's table, chart and gain of distillation into the README, from a finished run.

    make readme                                         # run the quickstart, then this script
    python benchmarks/readme_table.py runs/quickstart   # this script alone

Replaces the text between the two `quickstart` marks in README.md, and writes docs/quickstart.png.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from pages import replace_section

from toolchain.report.findings import findings
from toolchain.report.row import Report
from toolchain.report.tables import terminal_rows

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- quickstart: written by benchmarks/readme_table.py -->", "<!-- end of quickstart -->"


def main() -> None:
    run = Path(sys.argv[1])
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    manifest = json.loads((run / "student" / "manifest.json").read_text(encoding="utf-8"))
    replace_section(ROOT / "README.md", BEGIN, END, "\n".join(["", *make_section(report, manifest), ""]))
    shutil.copyfile(run / "report.png", ROOT / "docs" / "quickstart.png")


def make_section(report: Report, manifest: dict[str, Any]) -> list[str]:
    """Return the table, its origin, the chart and the gain of distillation, as lines of Markdown.

    `manifest` is that of the run's student.  The run must have a baseline and a student, exported in fp32 and measured.
    """
    gain = next((found for found in findings(report["rows"]) if found.title == "Distillation"), None)
    if gain is None:
        raise SystemExit("the run has no measured baseline and student in fp32; make it with: make quickstart")
    headers, rows = terminal_rows(report)
    machine = manifest["machine"]
    return [
        "| " + " | ".join(headers) + " |",
        "|" + "---|" * len(headers),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"Commit `{manifest['revision']}`, {machine['cpu']}, {machine['cores']} cores, {manifest['started_at'][:10]}.",
        "",
        "![accuracy against latency](docs/quickstart.png)",
        "",
        f"**{gain.title}: {gain.value}.** {gain.detail}.",
    ]


if __name__ == "__main__":
    main()
