"""Name the commands that measure what rows of a report lack."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from toolchain.report.measured import OUTDATED
from toolchain.report.row import ReportRow
from toolchain.runtimes import RUNTIMES
from toolchain.text_table import Note


def measure_commands(rows: Sequence[ReportRow]) -> list[str]:
    """Return the commands that measure the rows that are incomplete or outdated, each for all models that it fits."""
    models: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["run"] is not None and row["status"] != "ok":
            model, command, options = _command(row)
            models.setdefault((row["run"], command, options), []).append(model)
    return [f"clipkd {command} {' '.join(paths)}{options}" for (_, command, options), paths in models.items()]


def missing_notes(rows: Sequence[ReportRow]) -> list[Note]:
    """Return a note with the commands that complete a report; empty if it is complete."""
    commands = measure_commands(rows)
    text = "Some models are not measured, or not completely. Measure what is missing:"
    return [Note("\n  ".join((text, *commands)))] if commands else []


def _command(row: ReportRow) -> tuple[str, str, str]:
    """Return a row's model, the command that measures what it lacks, and the options after the model.

    The user replaces DEVICE, where a build kit's engines run, by cuda:0 or a name that `clipkd devices list` prints.
    """
    run = Path(str(row["run"]))
    if row["pytorch"] == "compiled":
        return shlex.quote(str(run / "recipe.yaml")), "run", f" --out {shlex.quote(str(run))}"
    model = run / str(row["role"]) if row["pytorch"] else run / "exported" / str(row["model"])
    runtime = RUNTIMES.get(str(row["runtime"]))
    device = row["device"] or ("DEVICE" if runtime is not None and runtime.is_kit else "cpu")
    lacks_latency, lacks_accuracy = row["p50_ms"] is None, row["top1"] is None
    if row["status"] in OUTDATED or not (lacks_latency or lacks_accuracy):
        lacks_latency = lacks_accuracy = True
    if device == "cpu" and not lacks_latency:
        return shlex.quote(str(model)), "evaluate", ""
    options = "" if device == "cpu" else f" --device {device}"
    return shlex.quote(str(model)), "profile", options + " --evaluate" * lacks_accuracy
