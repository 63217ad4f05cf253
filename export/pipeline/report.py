"""Write the report of a run as its last stage."""

from pathlib import Path

from toolchain.progress import Screen
from toolchain.report.cached_report import read_recorded
from toolchain.report.row import Report


def report_run(out: Path, screen: Screen) -> Report:
    """Return report.json; write it and its readable forms unless they are up to date."""
    screen.starts("report")
    recorded = read_recorded(out)
    if recorded is not None:
        screen.line("report", "cached")
        return recorded
    from toolchain.report.write import write_report

    document = write_report([out], out)
    screen.line("report", "written")
    return document
