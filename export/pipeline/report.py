"""Write the report of a run as its last stage."""

from pathlib import Path

from toolchain.progress import Screen
from toolchain.report.record import read_recorded
from toolchain.report.row import Report


def report_run(out: Path, screen: Screen) -> Report:
    """Return report.json, which is written with its readable forms unless they are of what the run has now."""
    screen.starts("report")
    recorded = read_recorded(out)
    if recorded is not None:
        screen.line("report", "cached")
        return recorded
    from toolchain.report.write import write_report

    document = write_report([out], out)
    screen.line("report", "written")
    return document
