"""Treat the report of a run as a stage, so an up-to-date report is read instead of written again.

Its files are in the root of the run, where users expect them, so its manifest is a hidden file next to them.
Importing this needs neither numpy nor a plotting package: a run with an up-to-date report loads none of them.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from toolchain.filesystem import file_sha256, write_json
from toolchain.report.measured import list_manifests
from toolchain.report.row import FIELDS, Report, read_report
from toolchain.stage import StageSpec

RECORD = ".report.json"
_VERSION = 1  # raise when the same measurements give different report files


def report_spec(run: Path) -> StageSpec:
    """Return the stage spec of a run's report; its key depends on everything in the run that a report shows.

    The key hashes whole manifests, because the digests of stages exclude times and training logs.  A manifest contains
    the hash of every other file of its stage.
    """
    return StageSpec(
        run / RECORD,
        kind="report",
        version=_VERSION,
        fields={"rows": list(FIELDS), "recipe": _recipe(run)},
        fingerprints={path.relative_to(run).as_posix(): file_sha256(path) for path in list_manifests(run)},
    )


def read_recorded(run: Path) -> Report | None:
    """Return the report of a run if its files are unchanged and match the run's current content; None otherwise."""
    try:
        record = json.loads((run / RECORD).read_text(encoding="utf-8"))
        key, files = record["key"], dict(record["files"])
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None
    if key != report_spec(run).key or any(_hash_or_none(run / name) != sha for name, sha in files.items()):
        return None
    return read_report(run)


def write_record(spec: StageSpec, names: Iterable[str]) -> None:
    """Record the hashes of a report's files right after they were written to its run."""
    run = spec.path.parent
    files = {name: file_sha256(run / name) for name in names}
    write_json(spec.path, {"key": spec.key, **spec.depends, "files": files})


def _hash_or_none(file: Path) -> str | None:
    return file_sha256(file) if file.is_file() else None


def _recipe(run: Path) -> str | None:
    """Return the recipe without its header, which contains the last command."""
    path = run / "recipe.yaml"
    if not path.is_file():
        return None
    return "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
