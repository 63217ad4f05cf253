"""The report of a run as a stage: what it depends on, and whether the files in the run are still that report.

Its files lie in the root of the run, where others look for them, so that its manifest is a hidden file beside them.
Importing this needs neither numpy nor a plotting package: a run whose report is up to date loads none of them.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from toolchain.filesystem import file_sha256, write_json
from toolchain.report.measured import manifests_of
from toolchain.report.row import FIELDS, Report, read_report
from toolchain.stage import StageSpec

RECORD = ".report.json"
_VERSION = 1  # raised when a report of the same measurements is written differently


def report_spec(run: Path) -> StageSpec:
    """Return the report of a run as a stage: its key is that of everything in the run that a report shows.

    It reads the manifests of stages and not their digests, which leave out times and training logs.  A manifest has the
    hash of every other file of its stage.
    """
    return StageSpec(
        run / RECORD,
        kind="report",
        version=_VERSION,
        fields={"rows": list(FIELDS), "recipe": _recipe(run)},
        fingerprints={path.relative_to(run).as_posix(): file_sha256(path) for path in manifests_of(run)},
    )


def read_recorded(run: Path) -> Report | None:
    """Return the report of a run if its files are as they were written, of what the run has now; None otherwise."""
    try:
        record = json.loads((run / RECORD).read_text(encoding="utf-8"))
        key, files = record["key"], dict(record["files"])
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None
    if key != report_spec(run).key or any(_hash_or_none(run / name) != sha for name, sha in files.items()):
        return None
    return read_report(run)


def write_record(spec: StageSpec, names: Iterable[str]) -> None:
    """Record the files of a report that was just written into its run."""
    run = spec.path.parent
    files = {name: file_sha256(run / name) for name in names}
    write_json(spec.path, {"key": spec.key, **spec.depends, "files": files})


def _hash_or_none(file: Path) -> str | None:
    return file_sha256(file) if file.is_file() else None


def _recipe(run: Path) -> str | None:
    """Return the recipe without its header, which names the command that was run last."""
    path = run / "recipe.yaml"
    if not path.is_file():
        return None
    return "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
