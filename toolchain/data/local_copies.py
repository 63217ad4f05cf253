"""Keep copies of remote shards in a folder of bounded size; all ranks and loaders of a machine share it.

    NAME.tar             a whole copy: the file is renamed to this name after its last byte has been written
    NAME.BYTES.partial   a copy in the making; its maker holds a lock on it, which ends with the process
    NAME.failed          why the last attempts to copy it failed; tried again after `_TRY_AGAIN_S`

NAME is a hash of the URL and its version, so a changed object never meets an old copy.  A copy's time of change is the
time of its last use.  Whoever needs space removes the copies that were used longest ago; a reader that has opened one
keeps reading it.
"""

import contextlib
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from toolchain.data.bad_samples import BROKEN_TAR, UnusableError
from toolchain.data.remote_files import RemoteFile, TransferError, fetch, without_query
from toolchain.errors import ClipkdError
from toolchain.filesystem import user_cache_folder
from toolchain.recipe.data import WebdatasetSpec

_TRY_AGAIN_S = 600.0
_STREAMS = 2  # copies that a process makes in advance at once
_FILLED = 0.75  # of the limit; the rest is for readers that are behind


@dataclass(frozen=True)
class LocalCopies:
    """The folder of copies of one source's shards."""

    folder: Path
    limit_bytes: int

    @property
    def ahead_bytes(self) -> int:
        """Bytes of the shards that are read and those copied in advance."""
        return int(_FILLED * self.limit_bytes)

    def path(self, file: RemoteFile) -> Path:
        return self.folder / f"{_name(file)}.tar"

    def open(self, file: RemoteFile) -> BinaryIO:
        """Open the copy of a shard; make it first if it is missing.

        Raises:
            UnusableError: it cannot be copied: its server fails, or what it sends is not whole.
            ClipkdError: it has been changed or removed, may not be read, or the folder cannot be written.
        """
        path = self.path(file)
        while True:
            with suppress(FileNotFoundError):
                opened = path.open("rb")
                if os.fstat(opened.fileno()).st_size == file.size_bytes:
                    with suppress(FileNotFoundError):  # removed meanwhile, and open
                        os.utime(path)
                    return opened
                opened.close()
                path.unlink()
            self.make(file, waits=True)

    def make(self, file: RemoteFile, *, waits: bool) -> None:
        """Copy a shard unless there is a copy; if another process is copying it, wait for that or return at once.

        Raises:
            UnusableError, ClipkdError: as for `open`.
        """
        with _describing_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with _hold(self.folder / f"{_name(file)}.{file.size_bytes}.partial", waits) as partial:
                if partial is None or self.path(file).exists():
                    return
                if failure := self._read_failure(file):
                    raise UnusableError(BROKEN_TAR, failure)
                self._make_room(partial)
                try:
                    fetch(file, partial)
                except TransferError as error:
                    self._failure_path(file).write_text(f"cannot be copied: {error}", encoding="utf-8")
                    raise UnusableError(BROKEN_TAR, f"cannot be copied: {error}") from error
                with partial.open("rb") as written:
                    os.fsync(written.fileno())
                partial.replace(self.path(file))

    def touch(self, files: Sequence[RemoteFile]) -> None:
        """Mark copies as used now, so that others are removed before them."""
        for file in files:
            with suppress(OSError):
                os.utime(self.path(file))

    def forget_failures(self) -> None:
        for path in self.folder.glob("*.failed"):
            path.unlink(missing_ok=True)

    def read_ahead(self, files: Sequence[RemoteFile]) -> None:
        """Copy shards in the background, the first first; a later call replaces what an earlier one asked for."""
        key = (os.getpid(), self.folder)  # threads do not survive a fork
        _readers.setdefault(key, _Reader(self)).read(files)

    def _failure_path(self, file: RemoteFile) -> Path:
        return self.folder / f"{_name(file)}.failed"

    def _read_failure(self, file: RemoteFile) -> str:
        with suppress(OSError):
            path = self._failure_path(file)
            if time.time() - path.stat().st_mtime < _TRY_AGAIN_S:
                return path.read_text(encoding="utf-8")
            path.unlink()
        return ""

    def _make_room(self, own: Path) -> None:
        """Remove what has been used longest ago, until all copies, whole and in the making, are within the limit."""
        with _hold(self.folder / ".lock", True):
            held_bytes, copies = 0, []
            for entry in os.scandir(self.folder):
                path = Path(entry.path)
                with suppress(FileNotFoundError):
                    if path.suffix == ".tar":
                        stat = entry.stat()
                        copies.append((stat.st_mtime_ns, stat.st_size, path))
                        held_bytes += stat.st_size
                    elif path.suffix == ".partial" and (path == own or not _remove_abandoned(path)):
                        held_bytes += int(path.name.split(".")[-2])
            for _, size_bytes, path in sorted(copies):
                if held_bytes <= self.limit_bytes:
                    break
                path.unlink(missing_ok=True)
                held_bytes -= size_bytes


def open_copies(spec: WebdatasetSpec, urls: Sequence[str]) -> LocalCopies:
    """Return the folder of copies of a recipe's remote shards; each list of shards has one of its own."""
    root = user_cache_folder() / "remote-shards" if spec.cache_dir is None else Path(spec.cache_dir)
    listed = "\n".join(map(without_query, urls))
    return LocalCopies(root / hashlib.sha256(listed.encode()).hexdigest()[:16], int(spec.cache_gb * 1e9))


class _Reader:
    """The threads of this process that copy shards of one source in advance."""

    def __init__(self, copies: LocalCopies) -> None:
        self.copies = copies
        self.wanted: tuple[RemoteFile, ...] = ()
        self.threads: list[threading.Thread] = []

    def read(self, files: Sequence[RemoteFile]) -> None:
        self.wanted = tuple(files)
        self.copies.touch(files)
        self.threads = [thread for thread in self.threads if thread.is_alive()]
        while len(self.threads) < _STREAMS:
            self.threads.append(threading.Thread(target=self._copy_wanted, daemon=True))
            self.threads[-1].start()

    def _copy_wanted(self) -> None:
        done: tuple[RemoteFile, ...] | None = None
        while done is not self.wanted:
            done = self.wanted
            for file in done:
                if done is not self.wanted:
                    break
                if not self.copies.path(file).exists():
                    with suppress(UnusableError, ClipkdError):  # whoever needs the shard meets the error again
                        self.copies.make(file, waits=False)


_readers: dict[tuple[int, Path], _Reader] = {}


def _name(file: RemoteFile) -> str:
    return hashlib.sha256(f"{file.url.partition('?')[0]}\0{file.version}".encode()).hexdigest()[:32]


@contextmanager
def _hold(path: Path, waits: bool) -> Iterator[Path | None]:
    """Hold a lock on a file that is made if it is missing; yield None if another holds it and `waits` is False.

    A lock of the open file, not of the process: two threads of a process must exclude each other, too.
    """
    while True:
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            if not _is_same(path, file):
                continue  # its last holder renamed or removed it
            try:
                yield path
            finally:
                if path.suffix == ".partial" and _is_same(path, file):
                    path.unlink()
            return


def _is_same(path: Path, file: BinaryIO) -> bool:
    with suppress(FileNotFoundError):
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    return False


def _remove_abandoned(path: Path) -> bool:
    """Remove a copy in the making if its maker has ended; return True then."""
    with path.open("r+b") as file, suppress(BlockingIOError):  # on NFS, LOCK_EX needs a file that can be written
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_same(path, file):
            path.unlink()
        return True
    return False


@contextlib.contextmanager
def _describing_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ClipkdError(
            f"{folder}: copies of the remote shards cannot be written there: {error.strerror}. Free disk space, lower "
            "data.cache_gb, or set data.cache_dir to another folder"
        ) from None
