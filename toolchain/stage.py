"""Make, resume and reuse the stages that form a run directory.

A stage is a function of some recipe fields and some input directories.  It works in `.NAME.partial/`, under a lock, and
then renames that to `NAME/`, which is never written again: a directory that exists is complete.  Its key hashes all its
inputs, so a stage with an unchanged key is reused.  `manifest.json` records its inputs.  Later stages depend on the
content digest, which covers the other files only: a repeated stage with the same bytes leaves later stages valid.
If the key changed, the stage is made again.  The earlier directory is kept until the new one is complete: in its place,
or in `RUN/.replaced/` if the new one can be resumed after an interruption.
Importing this needs neither torch nor numpy.
"""

import errno
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import chain, count
from pathlib import Path
from typing import Any

from toolchain.differences import abridge, describe_duration, list_differences
from toolchain.errors import ArtifactError, ClipkdError
from toolchain.filesystem import empty_folder, file_sha256, hold_lock, last_change, partial_path, replacing, write_json
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

REPLACED = ".replaced"
"""A folder of a run: stages and attempts that are being replaced, until the new stage is complete."""

COSTLY_S = 60.0
"""Work that took longer is replaced only on request."""

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

    described: Mapping[str, Any] = field(default_factory=dict)
    """Readable descriptions of what the fingerprints hash, by name, for messages.  The key does not depend on them."""

    resumes: bool = False
    """True if the work continues from the files of an interrupted attempt."""

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
    def recorded(self) -> dict[str, Any]:
        """Return what is recorded of the stage's inputs."""
        return {**self.depends, "described": dict(self.described)}

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


def run_stage(spec: StageSpec, work: Work, *, again: bool = False, replace: bool = True) -> Stage:
    """Make a stage's directory, resume an interrupted attempt, or reuse the finished stage.

    A finished stage with another key is kept until the new one is complete (see the module).  If a call asks for its
    key before that, it is put back.  `replace=False` refuses to replace work that took over a minute.  `again` makes
    the stage even if it is finished.

    Raises:
        ArtifactError: the finished stage is corrupt or not clipkd's, another process is making it, the disk is full,
            the directory is removed, or `replace` is False and work that took over a minute would be replaced.
    """
    key = spec.key
    if spec.path.exists():
        finished = open_stage(spec.path)
        if finished.manifest["key"] == key and not again:
            _delete(list_kept(spec.path))  # what a killed `_swap_in` left
            return finished
    spec.path.parent.mkdir(parents=True, exist_ok=True)
    if not spec.path.exists() and (kept := find_kept(spec)):
        kept.path.rename(spec.path)
        _remove_empty(kept.path.parent)
        return Stage(spec.path, kept.manifest, cached=True)
    if not replace:
        refuse_replacing(find_superseded(spec))
    _exchange_attempts(spec)
    with _lock(spec.partial), _explaining_disk_errors(spec.partial):
        manifest = _read_finished(spec.partial, key)
        cached = manifest is not None  # the last attempt was killed after its work, before the renaming
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
    attempt = read_attempt(partial)
    if attempt is None or attempt.key != key:
        empty_folder(partial, keep=_LOCK)  # an interrupted attempt with another key, whose checkpoints do not apply
        attempt = None
    earlier_s = attempt.took_s if attempt and spec.resumes else 0.0
    if spec.resumes:
        _set_aside(spec.path)
    _write_attempt(spec, key, earlier_s)
    started, started_at = time.monotonic(), datetime.now(timezone.utc)
    with _naming_kept(spec.path):
        summary = work(partial)
    for pattern in _TORN:
        for torn in partial.rglob(pattern):
            torn.unlink()
    files = _hashes(partial)
    manifest = {
        "format": _FORMAT,
        "key": key,
        **spec.recorded,
        "digest": _digest(files),
        "files": files,
        "summary": summary,
        "started_at": started_at.isoformat(timespec="seconds"),
        "took_s": round(earlier_s + time.monotonic() - started, 2),
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
        raise ArtifactError(
            f"{path / MANIFEST}: not a clipkd manifest ({error!r}). Restore it from a copy, or remove {path}"
        ) from None
    for name, expected in recorded.items():
        file = path / name
        got = file_sha256(file) if file.is_file() else "no such file"
        if got != expected:
            if (read_manifest(path) or {}).get("files") != recorded:  # another process replaced the stage meanwhile
                return open_stage(path)
            raise ArtifactError(
                f"{file}: changed since clipkd wrote it: expected sha256 {expected[:16]}, got {got[:16]}. "
                f"Restore it from a copy, or remove {path} and run the command again"
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


def _lock(partial: Path) -> AbstractContextManager[None]:
    partial.mkdir(exist_ok=True)
    return hold_lock(partial / _LOCK, f"{partial}: another process is making this stage; wait for it to end")


@contextmanager
def _explaining_disk_errors(partial: Path) -> Iterator[None]:
    try:
        yield
    except ClipkdError:
        raise
    except Exception as error:  # torch and safetensors raise their own errors for a full disk
        if not partial.exists():
            raise ArtifactError(f"{partial}: removed while clipkd was writing into it. Repeat the command") from error
        free, is_full = shutil.disk_usage(partial.parent).free, getattr(error, "errno", None) == errno.ENOSPC
        if not (is_full or "No space left" in str(error) or free < _FULL_BYTES):
            raise
        raise ArtifactError(
            f"{partial}: the disk is full ({free / 1e6:.0f} MB free). Finished stages and the last training checkpoint "
            "are kept: free some space and repeat the command to resume"
        ) from error


# Replaced work --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """An unfinished stage in its partial directory."""

    key: str
    recorded: Mapping[str, Any] | None
    """As `StageSpec.recorded`; None if an earlier version of clipkd wrote only the key."""

    took_s: float
    """Seconds of work: from each start or resumption to the last file written before the next interruption."""


@dataclass(frozen=True)
class Superseded:
    """Finished work, or an unfinished attempt, that a stage with another key would replace."""

    path: Path
    """The finished directory, in its place or in `.replaced`; for an attempt, the directory that it would become."""

    finished: bool
    took_s: float
    differences: tuple[str, ...]
    """The inputs in which it differs."""

    @property
    def is_costly(self) -> bool:
        return self.took_s > COSTLY_S


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished stage without checking its files; None if there is none."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return manifest if "key" in manifest else None
    except (OSError, TypeError, ValueError):
        return None


def count_seconds(manifest: Mapping[str, Any]) -> float:
    """Return the seconds that a finished stage took; earlier versions did not add those before an interruption."""
    summary = manifest.get("summary")
    trained_s = summary.get("train_s") if isinstance(summary, Mapping) else None
    return float(max(manifest.get("took_s") or 0.0, trained_s or 0.0))


def read_attempt(partial: Path) -> Attempt | None:
    """Return the unfinished attempt in a partial directory; None if there is none."""
    if not (partial / _KEY).exists() and (manifest := read_manifest(partial)):  # killed before it was renamed
        return Attempt(manifest["key"], manifest, count_seconds(manifest))
    try:
        key, _, content = (partial / _KEY).read_text(encoding="utf-8").partition("\n")
        began, spent_s, recorded = (partial / _KEY).stat().st_mtime, 0.0, None
        if content:
            entries = json.loads(content)
            began, spent_s, recorded = entries["began"], entries["spent_s"], entries["recorded"]
    except (KeyError, OSError, TypeError, ValueError):
        return None
    worked_s = max(0.0, last_change(partial, (_KEY, _LOCK)) - began)
    return Attempt(key, recorded, spent_s + worked_s) if key else None


def _write_attempt(spec: StageSpec, key: str, spent_s: float) -> None:
    content = {"began": time.time(), "spent_s": spent_s, "recorded": spec.recorded}
    with replacing(spec.partial / _KEY) as file:
        file.write_text(f"{key}\n{json.dumps(content)}", encoding="utf-8")


def find_superseded(spec: StageSpec) -> list[Superseded]:
    """Return the work that making the stage would replace: finished stages, and an attempt that could be resumed.

    A stage in `.replaced` no longer counts once an attempt with this key has begun: replacing it was accepted then.
    """
    found = []
    attempt = read_attempt(spec.partial) if spec.resumes else None
    begun = attempt is not None and attempt.key == spec.key
    for path in (spec.path, *([] if begun else list_kept(spec.path))):
        manifest = read_manifest(path)
        if manifest is not None and manifest["key"] != spec.key:
            differences = list_differences(manifest if "fields" in manifest else None, spec.recorded)
            found.append(Superseded(path, True, count_seconds(manifest), differences))
    if attempt is not None and not begun:
        found.append(Superseded(spec.path, False, attempt.took_s, list_differences(attempt.recorded, spec.recorded)))
    return found


def refuse_replacing(superseded: Iterable[Superseded]) -> None:
    """Refuse to replace work that took longer than a minute.

    Raises:
        ArtifactError: there is such work; the message names it, its differences and what to do.
    """
    costly = [each for each in superseded if each.is_costly]
    if costly:
        lines = [
            f"{each.path}{'' if each.finished else ' (unfinished)'} would be replaced. It took "
            f"{describe_duration(each.took_s)} and is of another recipe: {abridge(each.differences)}"
            for each in costly
        ]
        raise ArtifactError(
            "\n".join(lines) + "\nTo keep it, choose another --out. "
            "To replace it, add --replace to clipkd run, distill, adopt, cache or quantize"
        )


def find_kept(spec: StageSpec) -> Stage | None:
    """Return the finished stage with this key that is being replaced, if its files are complete."""
    for path in list_kept(spec.path):
        manifest = read_manifest(path)
        if manifest is not None and manifest["key"] == spec.key:
            try:
                return open_stage(path)
            except ArtifactError:  # killed while it was deleted
                continue
    return None


def list_kept(path: Path) -> list[Path]:
    """Return the directories in `.replaced` that were once at `path`, a stage's finished or partial directory."""
    kept = _kept_path(path)
    return [each for each in (kept, *sorted(kept.parent.glob(f"{kept.name}.[0-9]*"))) if each.exists()]


def _kept_path(path: Path) -> Path:
    """Return where `path` is kept: in `.replaced` of its run, the nearest folder above that has a run's recipe.yaml."""
    run = next((folder for folder in list(path.parents)[:3] if _is_resolved_recipe(folder)), path.parent)
    return run / REPLACED / path.relative_to(run)


def _set_aside(path: Path) -> None:
    """Move a directory that is being replaced into `.replaced`."""
    if path.exists():
        kept = _kept_path(path)
        kept.parent.mkdir(parents=True, exist_ok=True)
        numbered = (kept.with_name(f"{kept.name}.{number}") for number in count(2))
        path.rename(next(each for each in chain([kept], numbered) if not each.exists()))


def _exchange_attempts(spec: StageSpec) -> None:
    """Keep a costly attempt with another key in `.replaced`, and put back an attempt with this key from there."""
    attempt, key = read_attempt(spec.partial), spec.key
    if not spec.resumes or (attempt is not None and attempt.key == key):
        return
    kept = next((path for path in list_kept(spec.partial) if (old := read_attempt(path)) and old.key == key), None)
    is_costly = attempt is not None and attempt.took_s > COSTLY_S
    if is_costly or (kept is not None and spec.partial.exists()):
        with _lock(spec.partial):
            if is_costly:
                _set_aside(spec.partial)
            else:
                shutil.rmtree(spec.partial)
    if kept is not None:
        kept.rename(spec.partial)
        _remove_empty(kept.parent)


@contextmanager
def _naming_kept(path: Path) -> Iterator[None]:
    """Add to an error's message where the earlier stage, which this one replaces, is kept."""
    try:
        yield
    except ClipkdError as error:
        if kept := list_kept(path):
            error.args = (f"{error}. The earlier {path.name} is kept in {kept[0]} until the new one is complete",)
        raise


def _swap_in(partial: Path, path: Path) -> None:
    """Rename the finished directory into place; delete the stage that it replaces only after that."""
    _set_aside(path)
    partial.rename(path)
    _delete([*list_kept(path), *list_kept(partial)])


def _delete(kept: Iterable[Path]) -> None:
    """Delete directories in `.replaced`."""
    for path in kept:
        shutil.rmtree(path, ignore_errors=True)
        _remove_empty(path.parent)


def _remove_empty(folder: Path) -> None:
    """Remove a folder in `.replaced` and the folders above it, up to `.replaced` itself, as long as they are empty."""
    while REPLACED in folder.parts and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    skipped = {_LOCK, _KEY, MANIFEST}
    kept = [path for path in files if path.name not in skipped and path.relative_to(folder).parts[0] != SCRATCH]
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in kept}


def _digest(files: Mapping[str, str]) -> str:
    kept = {name: sha for name, sha in files.items() if name.partition("/")[0] not in _LOGS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
