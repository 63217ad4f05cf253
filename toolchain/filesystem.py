"""Files: atomic writes, hashes, lock files, and the user's cache folder."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from toolchain.errors import ArtifactError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_OS_ADVICE = {
    errno.EACCES: "Change its permissions, or choose another place",
    errno.EPERM: "Change its permissions, or choose another place",
    errno.EROFS: "Choose a place that can be written, as with --out",
    errno.EEXIST: "It is a file where a folder is needed; choose another place",
    errno.ENOTDIR: "A part of this path is a file where a folder is needed; choose another place",
    errno.EISDIR: "It is a folder where a file is needed; choose another place",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EMFILE: "Raise the limit with ulimit -n, or use fewer --workers",
    errno.ENOLCK: "This file system has no locks; choose another place",
}
"""Advice for errors of the operating system that a user can fix; others are bugs."""


def describe_os_error(error: OSError) -> str | None:
    """Return a message for an error of the operating system that a user can fix, else None."""
    if error.errno in _FULL:
        return (
            f"the disk is full ({error}). Finished stages and the last training checkpoint are kept: "
            "free some space and repeat the command to resume"
        )
    if error.errno not in _OS_ADVICE or error.filename is None:
        return None
    return f"{os.fsdecode(error.filename)}: {error.strerror}. {_OS_ADVICE[error.errno]}"


def partial_path(path: Path) -> Path:
    """Return the directory in which the directory `path` is made: `.NAME.partial` next to it."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield the file to write; it becomes `path` when the block ends without an error, and is removed otherwise.

    A reader sees the old or the new file, never a partial one, even after a power failure.  Several processes may
    write the same file at once.  Not `durable`: a power failure may damage the file, and a disk writes many sooner.
    """
    # Processes of several machines, which share a folder, may have the same number.
    partial = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}-{os.urandom(4).hex()}.partial")
    try:
        yield partial
        if durable:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, document: Any, *, allow_nan: bool = True) -> None:
    """Write a JSON document atomically.

    Raises:
        ValueError: the document has NaN or infinity, and `allow_nan` is False.
    """
    text = json.dumps(document, indent=1, allow_nan=allow_nan) + "\n"
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file that clipkd wrote.

    Raises:
        ArtifactError: it is not there, or it was changed into something else.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; clipkd wrote it. Restore the folder {path.parent}") from None
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON: {error}. Restore the folder {path.parent}, as from a copy") from None
    return document


@contextmanager
def hold_lock(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock file until the block or the process ends, even if it is killed.

    Raises:
        ArtifactError: another process holds it; `busy` is the message.
    """
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: loaders of a killed process would keep it
        except (BlockingIOError, PermissionError):  # POSIX allows either
            raise ArtifactError(busy) from None
        yield


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def empty_folder(folder: Path, *, keep: str) -> None:
    """Delete everything in a folder except the entry of this name."""
    for entry in folder.iterdir():
        if entry.name == keep:
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def last_change(folder: Path, ignored: Collection[str]) -> float:
    """Return when the newest file below a folder was changed, in seconds since 1970; 0 if there is none.

    Files of the ignored names do not count, nor do those that another process removes meanwhile.
    """
    newest = 0.0
    for parent, _, names in os.walk(folder):
        for name in set(names).difference(ignored):
            with suppress(FileNotFoundError):
                newest = max(newest, Path(parent, name).stat().st_mtime)
    return newest


def user_cache_folder() -> Path:
    """Return the user's cache folder, for files that clipkd can make again."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "clipkd"
