"""Make, resume and reuse the stages that form a run directory.

A stage is a function of some recipe fields and some input directories.  It works in `.NAME.partial/`, under a lock, and
then renames that to `NAME/`, which is never written again: a directory that exists is complete.  Its key hashes all its
inputs, so a stage with an unchanged key is reused.  `manifest.json` records its inputs.  Later stages depend on the
content digest, which covers the other files only: a repeated stage with the same bytes leaves later stages valid.
Importing this needs neither torch nor numpy.
"""

import errno
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from toolchain.errors import ArtifactError, ClipkdError
from toolchain.filesystem import file_sha256, hold_lock, partial_path, write_json
from toolchain.provenance import machine, revision, versions

MANIFEST = "manifest.json"
REFERENCE_KIND = "reference"  # kind of a stage that measures a checkpoint in PyTorch, without an export
RESOLVED = "resolved by clipkd:"  # in the header of a run's recipe.yaml
_FORMAT = 1
SCRATCH = ".scratch"
"""A folder of files in a stage's directory that only resuming needs; a complete stage has none."""

# Logs with times: recorded, but not in the digest, so nothing depends on them.
_LOGS = frozenset({MANIFEST, "train.jsonl", "tensorboard"})
_KEY, _LOCK = "key", "lock"
_TORN = ("*.partial", ".tmp??????")
"""Incomplete files of a killed attempt: names used by clipkd, and by safetensors."""

_FULL_BYTES = 1 << 20


@dataclass(frozen=True)
class Stage:
    """A complete stage's directory."""

    path: Path
    manifest: dict[str, Any]
    cached: bool
    """True if an earlier call made it."""

    @property
    def digest(self) -> str:
        """Return the content digest, which later stages depend on."""
        return str(self.manifest["digest"])


@dataclass(frozen=True)
class StageSpec:
    """The specification of a stage: its path, and everything that determines its bytes."""

    path: Path
    kind: str
    version: int
    """Increased when the code of this kind of stage changes its result."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    """The recipe fields that the work reads."""

    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Hashes of external data and weights, by name."""

    inputs: Mapping[str, Stage] = field(default_factory=dict)
    """The stages whose files the work reads."""

    @property
    def depends(self) -> dict[str, Any]:
        """Return everything that the stage depends on, as recorded in its manifest."""
        return {
            "kind": self.kind,
            "version": self.version,
            "fields": dict(self.fields),
            "fingerprints": dict(self.fingerprints),
            "inputs": {name: stage.digest for name, stage in self.inputs.items()},
        }

    @property
    def key(self) -> str:
        """Return the hash of everything that the stage depends on."""
        return hashlib.sha256(json.dumps(self.depends, sort_keys=True).encode()).hexdigest()

    @property
    def partial(self) -> Path:
        """Return the directory in which the stage is made."""
        return partial_path(self.path)


Work = Callable[[Path], dict[str, Any]]
"""Writes a stage's files into the directory it is given and returns the manifest's summary."""


def run_stage(spec: StageSpec, work: Work, *, again: bool = False) -> Stage:
    """Make a stage's directory, resume an interrupted attempt, or reuse the finished stage.

    `again`: make it anew even if it is finished; the earlier one stays in place until the new one is complete.

    Raises:
        ArtifactError: a finished stage is corrupt or foreign, another process is making it, or the disk is full.
    """
    key = spec.key
    if spec.path.exists():
        finished = open_stage(spec.path)
        if finished.manifest["key"] == key and not again:
            return finished
    spec.path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(spec.partial), _explaining_full_disk(spec.partial):
        manifest = _read_finished(spec.partial, key)
        cached = manifest is not None  # the last attempt was killed while the directory was renamed
        if manifest is None:
            manifest = _make(spec, key, work)
        shutil.rmtree(spec.partial / SCRATCH, ignore_errors=True)  # not earlier: a killed attempt needs it to resume
        (spec.partial / _KEY).unlink(missing_ok=True)
        (spec.partial / _LOCK).unlink()
        _swap_in(spec.partial, spec.path)
    return Stage(spec.path, manifest, cached)


def _make(spec: StageSpec, key: str, work: Work) -> dict[str, Any]:
    """Do a stage's work in its partial directory; write and return its manifest."""
    partial = spec.partial
    if not (partial / _KEY).exists() or (partial / _KEY).read_text() != key:
        _empty(partial)  # an interrupted attempt with another key, whose checkpoints do not apply
        (partial / _KEY).write_text(key)
    started, started_at = time.monotonic(), datetime.now(timezone.utc)
    summary = work(partial)
    for pattern in _TORN:
        for torn in partial.rglob(pattern):
            torn.unlink()
    files = _hashes(partial)
    manifest = {
        "format": _FORMAT,
        "key": key,
        **spec.depends,
        "digest": _digest(files),
        "files": files,
        "summary": summary,
        "started_at": started_at.isoformat(timespec="seconds"),
        "took_s": round(time.monotonic() - started, 2),
        "machine": machine(),
        "versions": versions(),
        "revision": revision(),
    }
    write_json(partial / MANIFEST, manifest)
    return manifest


def is_made(spec: StageSpec) -> bool:
    """Return True if `run_stage` would reuse the existing stage."""
    try:
        return bool(open_stage(spec.path).manifest["key"] == spec.key)
    except ArtifactError:
        return False


def _read_finished(partial: Path, key: str) -> dict[str, Any] | None:
    """Return the manifest of an attempt that finished its work; None if it did not, or had another key."""
    try:
        manifest: dict[str, Any] = json.loads((partial / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # after a power failure the file may exist without its content
        return None
    return manifest if manifest["key"] == key else None


def open_stage(path: Path) -> Stage:
    """Return a finished stage after checking every file against its recorded hash.

    Raises:
        ArtifactError: no such directory, it was not made by clipkd, or a file is missing or has changed.
    """
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such directory")
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        recorded: dict[str, str] = dict(manifest["files"])
        digest, _ = manifest["digest"], manifest["key"]
    except FileNotFoundError:
        raise ArtifactError(
            f"{path}: no {MANIFEST}, so clipkd did not make this directory and does not change it"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path / MANIFEST}: not a clipkd manifest ({error!r})") from None
    for name, expected in recorded.items():
        file = path / name
        got = file_sha256(file) if file.is_file() else "no such file"
        if got != expected:
            raise ArtifactError(
                f"{file}: changed since clipkd wrote it: expected sha256 {expected[:16]}, got {got[:16]}. "
                f"Remove {path} and run the command again"
            )
    if digest != _digest(recorded):
        raise ArtifactError(f"{path / MANIFEST}: its digest does not match its list of files; remove {path}")
    return Stage(path, manifest, cached=True)


def folder_fingerprint(folder: Path) -> str:
    """Return a hash of every file in a folder that is not a stage, for example an external model."""
    return _digest(_hashes(folder))


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Lock a run directory, because two commands at once would replace each other's stages.

    Raises:
        ArtifactError: the path is a file or not a run directory, or another process holds the lock.
    """
    if run.exists() and not run.is_dir():
        raise ArtifactError(f"{run}: is a file; expected a run directory. Choose another --out")
    if run.is_dir() and any(run.iterdir()) and not (run / ".lock").exists() and not _is_resolved_recipe(run):
        raise ArtifactError(f"{run}: not empty, and no recipe.yaml of clipkd; not a run. Choose another --out")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{run}: cannot make this directory: {error.strerror}. Choose another --out") from None
    with hold_lock(
        run / ".lock", f"{run}: another clipkd is using this run; wait for it to end, or choose another --out"
    ):
        yield


def _is_resolved_recipe(run: Path) -> bool:
    """Return True if the directory's recipe.yaml was written by clipkd and not by a user."""
    recipe = run / "recipe.yaml"
    return recipe.is_file() and RESOLVED in recipe.read_text(encoding="utf-8", errors="replace")


@contextmanager
def _lock(partial: Path) -> Iterator[None]:
    partial.mkdir(exist_ok=True)
    with hold_lock(partial / _LOCK, f"{partial}: another process is making this stage; wait for it to end"):
        yield


@contextmanager
def _explaining_full_disk(partial: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch and safetensors raise their own errors for a full disk
        free = shutil.disk_usage(partial.parent).free
        disk_full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if isinstance(error, ClipkdError) or not (disk_full or free < _FULL_BYTES):
            raise
        raise ArtifactError(
            f"{partial}: the disk is full ({free / 1e6:.0f} MB free). Finished stages and the last training "
            "checkpoint are kept: free some space and repeat the command to resume"
        ) from error


def _swap_in(partial: Path, path: Path) -> None:
    """Rename the finished directory into place; an older stage is moved away first, then removed."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name == _LOCK:
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    skipped = {_LOCK, _KEY, MANIFEST}
    kept = [path for path in files if path.name not in skipped and path.relative_to(folder).parts[0] != SCRATCH]
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in kept}


def _digest(files: Mapping[str, str]) -> str:
    kept = {name: sha for name, sha in files.items() if name.partition("/")[0] not in _LOGS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
