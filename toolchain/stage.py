"""Stages: what a run directory is made of.

A stage is a function of some recipe fields and some input directories.  It works in `.NAME.partial/`, under a lock, and
then renames that to `NAME/`, which is never written again: a directory that exists is complete.  Its key hashes all it
depends on, so a stage whose key is unchanged is reused.  `manifest.json` says what it came from; the content digest,
which the stages after it depend on, is of the other files alone, so redoing a stage that gives the same bytes redoes
nothing else.  Importing this needs neither torch nor numpy.
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
from toolchain.filesystem import file_sha256, held, partial_path, write_json
from toolchain.provenance import machine, revision, versions

MANIFEST = "manifest.json"
REFERENCE_KIND = "reference"  # the kind of a stage that measured a checkpoint in PyTorch: nothing of it was exported
RESOLVED = "resolved by clipkd:"  # in the header of a run's recipe.yaml
_FORMAT = 1
SCRATCH = ".scratch"
"""A folder, in a stage's directory, of what only continuing an interrupted attempt needs; a complete stage has none."""

# How a stage went, with times: recorded, but nothing depends on it.
_LOGS = frozenset({MANIFEST, "train.jsonl", "tensorboard"})
_KEY, _LOCK = "key", "lock"
_TORN = ("*.partial", ".tmp??????")
"""Files that an earlier, killed attempt was writing: under our own name for such, and under that of safetensors."""

_FULL_BYTES = 1 << 20


@dataclass(frozen=True)
class Stage:
    """A complete stage's directory."""

    path: Path
    manifest: dict[str, Any]
    cached: bool
    """Whether an earlier call made it."""

    @property
    def digest(self) -> str:
        """What later stages depend on."""
        return str(self.manifest["digest"])


@dataclass(frozen=True)
class StageSpec:
    """What a stage is: where it lies, and everything that decides the bytes it makes."""

    path: Path
    kind: str
    version: int
    """Raised when the code of this kind of stage changes its result."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    """The recipe fields that the work reads."""

    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Hashes of external data and weights, by name."""

    inputs: Mapping[str, Stage] = field(default_factory=dict)
    """The stages whose files the work reads."""

    @property
    def depends(self) -> dict[str, Any]:
        """Everything that the stage depends on, as its manifest records it."""
        return {
            "kind": self.kind,
            "version": self.version,
            "fields": dict(self.fields),
            "fingerprints": dict(self.fingerprints),
            "inputs": {name: stage.digest for name, stage in self.inputs.items()},
        }

    @property
    def key(self) -> str:
        """The hash of all that the stage depends on."""
        return hashlib.sha256(json.dumps(self.depends, sort_keys=True).encode()).hexdigest()

    @property
    def partial(self) -> Path:
        """The directory in which the stage is made."""
        return partial_path(self.path)


Work = Callable[[Path], dict[str, Any]]
"""Writes a stage's files into the directory it is given and returns the manifest's summary."""


def run_stage(spec: StageSpec, work: Work) -> Stage:
    """Make a stage's directory, resume it where it was interrupted, or reuse it.

    Raises:
        ArtifactError: a finished stage is damaged or foreign, another process is at work on this one, the disk is full.
    """
    key = spec.key
    if spec.path.exists():
        finished = open_stage(spec.path)
        if finished.manifest["key"] == key:
            return finished
    spec.path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(spec.partial), _explaining_full_disk(spec.partial):
        manifest = _manifest_of(spec.partial, key)
        cached = manifest is not None  # killed only while the directory was moved into place
        if manifest is None:
            manifest = _make(spec, key, work)
        shutil.rmtree(spec.partial / SCRATCH, ignore_errors=True)  # only now: until here, a killed attempt resumes
        (spec.partial / _KEY).unlink(missing_ok=True)
        (spec.partial / _LOCK).unlink()
        _swap_in(spec.partial, spec.path)
    return Stage(spec.path, manifest, cached)


def _make(spec: StageSpec, key: str, work: Work) -> dict[str, Any]:
    """Do a stage's work in its partial directory and write its manifest, which is returned."""
    partial = spec.partial
    if not (partial / _KEY).exists() or (partial / _KEY).read_text() != key:
        _empty(partial)  # an interrupted attempt at something else: its checkpoints do not belong here
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
    """Return True if `run_stage` would reuse what is there."""
    try:
        return bool(open_stage(spec.path).manifest["key"] == spec.key)
    except ArtifactError:
        return False


def _manifest_of(partial: Path, key: str) -> dict[str, Any] | None:
    """The manifest of an attempt that finished its work; None where it did not, or was at something else."""
    try:
        manifest: dict[str, Any] = json.loads((partial / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # a machine that loses power may leave the name without the content
        return None
    return manifest if manifest["key"] == key else None


def open_stage(path: Path) -> Stage:
    """A finished stage, every file of it checked against its recorded hash.

    Raises:
        ArtifactError: no such directory, not made by clipkd, or a file is missing or has changed.
    """
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such directory")
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        recorded: dict[str, str] = dict(manifest["files"])
        digest, _ = manifest["digest"], manifest["key"]
    except FileNotFoundError:
        raise ArtifactError(
            f"{path}: no {MANIFEST}; clipkd did not make this directory and will not touch it"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path / MANIFEST}: not a clipkd manifest ({error!r})") from None
    for name, expected in recorded.items():
        file = path / name
        got = file_sha256(file) if file.is_file() else "no such file"
        if got != expected:
            raise ArtifactError(
                f"{file}: damaged since clipkd wrote it: sha256 {got[:16]}, recorded {expected[:16]}. "
                f"Remove {path} and repeat the command to make it again"
            )
    if digest != _digest(recorded):
        raise ArtifactError(f"{path / MANIFEST}: its digest does not belong to its list of files; remove {path}")
    return Stage(path, manifest, cached=True)


def folder_fingerprint(folder: Path) -> str:
    """A hash of every file in a folder that is not a stage: an external model, say."""
    return _digest(_hashes(folder))


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold a run directory: two commands at once would redo each other's stages.

    Raises:
        ArtifactError: the path is a file or a directory that is not a run's, or another process holds it.
    """
    if run.exists() and not run.is_dir():
        raise ArtifactError(f"{run}: is a file; --out names a run directory")
    if run.is_dir() and any(run.iterdir()) and not (run / ".lock").exists() and not _resolved_here(run):
        raise ArtifactError(f"{run}: not empty and has no recipe.yaml of clipkd's; not a run. Choose another --out")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{run}: cannot make this directory: {error.strerror}. Choose another --out") from None
    with held(run / ".lock", f"{run}: another clipkd is at work in this run; wait for it, or choose another --out"):
        yield


def _resolved_here(run: Path) -> bool:
    """Whether the directory's recipe.yaml is a run's, and not somebody's own that a run would overwrite."""
    recipe = run / "recipe.yaml"
    return recipe.is_file() and RESOLVED in recipe.read_text(encoding="utf-8", errors="replace")


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    partial.mkdir(exist_ok=True)
    with held(partial / _LOCK, f"{partial}: another process is at work on this stage; wait for it"):
        yield


@contextmanager
def _explaining_full_disk(partial: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch and safetensors raise errors of their own for it
        free = shutil.disk_usage(partial.parent).free
        said = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if isinstance(error, ClipkdError) or not (said or free < _FULL_BYTES):
            raise
        raise ArtifactError(
            f"{partial}: the disk is full ({free / 1e6:.0f} MB free). Nothing finished is lost; "
            "free some space and repeat the command to continue"
        ) from error


def _swap_in(partial: Path, path: Path) -> None:
    """Rename the finished directory into place; a stage it supersedes is moved aside first, then removed."""
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
