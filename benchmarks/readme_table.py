"""Put the quickstart's table and picture into the README, from a run.

    python benchmarks/readme_table.py runs/quickstart

Replaces what stands between the two `quickstart` marks in README.md and writes docs/quickstart.png.
"""

import json
import shutil
import sys
from pathlib import Path

from toolchain.report.tables import terminal_rows

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- quickstart: written by benchmarks/readme_table.py -->", "<!-- end of quickstart -->"


def main() -> None:
    run = Path(sys.argv[1])
    headers, rows = terminal_rows(json.loads((run / "report.json").read_text(encoding="utf-8")))
    manifest = json.loads((run / "student" / "manifest.json").read_text(encoding="utf-8"))
    machine = manifest["machine"]
    lines = [
        "| " + " | ".join(headers) + " |",
        "|" + "---|" * len(headers),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"Commit `{manifest['revision']}`, {machine['cpu']}, {machine['cores']} cores, {manifest['started_at'][:10]}.",
        "",
        "![accuracy against latency](docs/quickstart.png)",
    ]
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    readme.write_text("\n".join([before + BEGIN, "", *lines, "", END + after]), encoding="utf-8")
    shutil.copyfile(run / "report.png", ROOT / "docs" / "quickstart.png")


if __name__ == "__main__":
    main()
