"""Index webdataset shards: which samples a shard has, and where their files lie in it.

    shards/HASH.index   of each shard, the positions of its pairs; read when a batch needs the shard
    shards/HASH.list   of a recipe's shards together, how many pairs each has; read when training starts

Both lie in the user's cache folder and are made again whenever a shard has changed, or they cannot be read: their
checksums find damage, so they need not reach the disk before training goes on.  The lists of many shards make it
unnecessary to open an index of each: a start asks only whether the shards are the same.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from toolchain.data.bad_samples import BROKEN_TAR, LeftOut, UnusableError, describe, merge_left_out, to_utf8
from toolchain.data.local_copies import LocalCopies
from toolchain.data.pairing import group_files, list_unused_images, pair_files
from toolchain.data.remote_files import RemoteFile
from toolchain.data.tar_files import PAIRING_VERSION, Member, read_open_members
from toolchain.errors import ClipkdError
from toolchain.filesystem import replacing, user_cache_folder
from toolchain.progress import Progress

_LISTED_FROM = 64  # shards from which they have a list: one file instead of as many as there are shards
_PROCESSES_FROM = 256  # shards to index from which processes do so: to start them takes a second
_THREADS = 8
_SENT_TOGETHER = 16  # shards
_PAIR = np.dtype(
    [("image", "<i8"), ("caption", "<i8"), ("image_bytes", "<u4"), ("caption_bytes", "<u4"), ("is_json", "?")]
)


class Shard(NamedTuple):
    """A shard's entry in the index."""

    path: Path
    """The file; of a remote shard the local copy, which is made when it is needed."""

    size_bytes: int
    mtime_ns: int
    """0 for a remote shard, which has a version."""

    num_samples: int
    left_out: tuple[LeftOut, ...] = ()
    """Members that form no image-text pair, and damage to the archive itself."""

    caption_key: str | None = None
    """The recipe's key of the caption in a sample's JSON."""

    remote: RemoteFile | None = None

    @property
    def name(self) -> str:
        """Path or URL, for messages."""
        return str(self.path) if self.remote is None else self.remote.name


def changed_error(shard: Shard) -> ClipkdError:
    return ClipkdError(
        f"{shard.name}: has changed since training began, so sample numbers no longer match. Start training again"
    )


def index_shards(paths: Sequence[Path], caption_key: str | None, progress: Progress) -> tuple[Shard, ...]:
    """Return the shards with their numbers of samples; those that are not in the index are read.

    Raises:
        ClipkdError: a shard cannot be read, or the index cannot be written.
    """
    if len(paths) < _LISTED_FROM:
        few = _map_in_threads(partial(_index_shard, caption_key=caption_key), paths)
        return tuple(_report(few, progress, 0, len(paths)))
    listed = _list_path(paths, caption_key)
    shards = _read_list(listed, paths, caption_key)
    missing = [position for position, shard in enumerate(shards) if shard is None]
    indexed = _index_in_processes([paths[position] for position in missing], caption_key)
    for row, shard in _report(indexed, progress, len(paths) - len(missing), len(paths)):
        shards[missing[row]] = shard
    whole = tuple(shard for shard in shards if shard is not None)
    assert len(whole) == len(paths)
    if missing:
        _write_list(listed, whole)
    return whole


def index_remote_shards(
    files: Sequence[RemoteFile], copies: LocalCopies, caption_key: str | None, progress: Progress
) -> tuple[Shard, ...]:
    """Return remote shards; those whose number of samples no index tells are copied here once, to count them.

    Raises:
        ClipkdError: a shard cannot be copied or read, or the index cannot be written.
    """

    def index(file: RemoteFile) -> Shard:
        unread = Shard(copies.path(file), file.size_bytes, 0, file.num_samples or 0, (), caption_key, file)
        if file.num_samples is not None:
            return unread
        try:
            pair_N, left_out = _load_remote_index(unread, copies)
        except UnusableError as error:  # no number of samples, so no order: nothing can start
            raise ClipkdError(
                f"{file.name}: {error.detail}. Its samples cannot be counted. Repeat the command to continue with it"
            ) from None
        return unread._replace(num_samples=len(pair_N), left_out=left_out)

    return tuple(_report(_map_in_threads(index, files), progress, 0, len(files)))


def _map_in_threads(index: Callable[[Any], Shard], sources: Sequence[Any]) -> Iterator[Shard]:
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            yield from pool.map(index, sources)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or an interrupt, do not start the rest


def _report(indexed: Iterable[Any], progress: Progress, done: int, total: int) -> Iterator[Any]:
    """Yield what is indexed, and report how many there are."""
    for found in indexed:
        done += 1
        progress("indexing shards", done, total)
        yield found


# Positions of a shard's pairs


@lru_cache(maxsize=32)
def load_pairs(shard: Shard, copies: LocalCopies | None = None) -> NDArray[np.void]:
    """Return the positions of a shard's pairs, from the user's cache folder if they are there.

    Raises:
        UnusableError: it is remote and cannot be copied.
        ClipkdError: it has changed or cannot be read, or the index cannot be written.
    """
    if shard.remote is not None:
        assert copies is not None
        return _load_remote_index(shard, copies)[0]
    now, pair_N = _load_index(shard.path, shard.caption_key)
    if now != shard:
        raise changed_error(shard)
    return pair_N


def _index_shard(path: Path, caption_key: str | None) -> Shard:
    return _load_index(path, caption_key)[0]


def _load_index(path: Path, caption_key: str | None) -> tuple[Shard, NDArray[np.void]]:
    """Return a shard and its pairs from the user's cache folder; make and store the index if it is missing."""
    try:
        stat = path.stat()
        stamp = [PAIRING_VERSION, stat.st_size, stat.st_mtime_ns]
        kept = _index_path(str(path.resolve()), caption_key)
        found = _read_index(kept, stamp)
        if found is None:
            with path.open("rb") as file:
                found = _pair_file(file, str(path), caption_key)
            _save_index(kept, stamp, *found)
    except OSError as error:
        raise ClipkdError(f"{path}: cannot be read: {error.strerror}") from None
    pair_N, left_out = found
    return Shard(path, stat.st_size, stat.st_mtime_ns, len(pair_N), left_out, caption_key), pair_N


def _load_remote_index(shard: Shard, copies: LocalCopies) -> tuple[NDArray[np.void], tuple[LeftOut, ...]]:
    assert shard.remote is not None
    version = int.from_bytes(hashlib.sha256(shard.remote.version.encode()).digest()[:7], "big")
    stamp = [PAIRING_VERSION, shard.size_bytes, version]
    kept = _index_path(shard.remote.name, shard.caption_key)
    found = _read_index(kept, stamp)
    if found is None:
        with copies.open(shard.remote) as file:
            found = _pair_file(file, shard.name, shard.caption_key)
        _save_index(kept, stamp, *found)
    return found


def _index_path(name: str, caption_key: str | None) -> Path:
    preference = "" if caption_key is None else "\0json"  # with a key, the pairs are others
    digest = hashlib.sha256(f"{name}{preference}".encode("utf-8", "surrogateescape")).hexdigest()
    return user_cache_folder() / "shards" / f"{digest[:32]}.index"


def _read_index(kept: Path, stamp: list[int]) -> tuple[NDArray[np.void], tuple[LeftOut, ...]] | None:
    """Return a stored index; None if there is none, it is of another shard, or it is damaged."""
    head, _, pairs = _read_checked(kept).partition(b"\n")
    if not head or (about := json.loads(head))["stamp"] != stamp:
        return None
    return np.frombuffer(pairs, _PAIR), _parse_left_out(about["left_out"])


def _read_checked(path: Path) -> bytes:
    """Return what `_write_checked` wrote; nothing if there is no such file or it is damaged."""
    with contextlib.suppress(OSError):
        digest, _, content = path.read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() == digest:
            return content
    return b""


def _write_checked(path: Path, content: bytes) -> None:
    """Write a file of the index, and before its content the sha256 of that."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=False) as written:
            written.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    except OSError as error:
        raise ClipkdError(
            f"{path.parent}: the index of the shards cannot be written there: {error.strerror}. "
            "Free disk space, or set XDG_CACHE_HOME to another folder"
        ) from None


def _parse_left_out(stored: Iterable[Any]) -> tuple[LeftOut, ...]:
    return tuple(LeftOut(reason, number, tuple(examples), is_sample) for reason, number, examples, is_sample in stored)


def _save_index(kept: Path, stamp: list[int], pair_N: NDArray[np.void], left_out: tuple[LeftOut, ...]) -> None:
    _write_checked(kept, json.dumps({"stamp": stamp, "left_out": left_out}).encode() + b"\n" + pair_N.tobytes())


def _pair_file(file: BinaryIO, name: str, caption_key: str | None) -> tuple[NDArray[np.void], tuple[LeftOut, ...]]:
    """Return the pairs of an opened shard, and the samples that form no pair."""
    members, damage = read_open_members(file)
    pair_N, left_out = _pair_members(name, members, prefers_json=caption_key is not None)
    if damage:
        example = f"{name}: {damage}; samples found in it: {len(pair_N):,}"
        left_out += (LeftOut(BROKEN_TAR, 1, (to_utf8(example),)),)
    return pair_N, left_out


def _pair_members(
    name: str, members: list[Member], *, prefers_json: bool
) -> tuple[NDArray[np.void], tuple[LeftOut, ...]]:
    """Return the pairs of a shard in the order of their first files, and the samples that form no pair."""
    rows, left_out = [], []
    for key, files in group_files(members).items():
        try:
            image, caption, is_json = pair_files(files, prefers_json=prefers_json)
        except UnusableError as error:
            left_out.append(LeftOut(error.reason, error.number, (describe(f"{name}: {key}", error),)))
            continue
        left_out += list_unused_images(name, files)
        rows.append((image.offset, caption.offset, image.size_bytes, caption.size_bytes, is_json))
    return np.array(rows, _PAIR), merge_left_out(left_out)


# The list of many shards


def _list_path(paths: Sequence[Path], caption_key: str | None) -> Path:
    names = "\0".join([str(PAIRING_VERSION), str(caption_key), str(Path.cwd()), *map(str, paths)])
    digest = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
    return user_cache_folder() / "shards" / f"{digest[:32]}.list"


def _read_list(listed: Path, paths: Sequence[Path], caption_key: str | None) -> list[Shard | None]:
    """Return the shards that a list has and that are unchanged; None for others."""
    entries: list[Any] = json.loads(_read_checked(listed) or b"0") or [None] * len(paths)
    shards: list[Shard | None] = []
    for path, entry in zip(paths, entries, strict=True):
        try:
            stat = path.stat()
        except OSError as error:
            raise ClipkdError(f"{path}: cannot be read: {error.strerror}") from None
        is_same = entry is not None and entry[:2] == [stat.st_size, stat.st_mtime_ns]
        if is_same:
            size_bytes, mtime_ns, num_samples, left_out = entry
            shards.append(Shard(path, size_bytes, mtime_ns, num_samples, _parse_left_out(left_out), caption_key))
        else:
            shards.append(None)
    return shards


def _write_list(listed: Path, shards: Sequence[Shard]) -> None:
    entries = [[shard.size_bytes, shard.mtime_ns, shard.num_samples, shard.left_out] for shard in shards]
    _write_checked(listed, json.dumps(entries, separators=(",", ":")).encode())


# Processes: parsing headers takes a core, not the disk


def _index_in_processes(paths: Sequence[Path], caption_key: str | None) -> Iterator[tuple[int, Shard]]:
    """Yield each path's position and shard as they become ready; as many processes index as there are usable cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(cores, -(-len(paths) // _SENT_TOGETHER))
    if count <= 1 or len(paths) < _PROCESSES_FROM:
        yield from enumerate(_map_in_threads(partial(_index_shard, caption_key=caption_key), paths))
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the state of torch's threads
    positions: dict[Any, Iterator[int]] = {}
    processes = []
    try:
        for first in range(count):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (paths[first::count], caption_key, theirs)
            processes.append(context.Process(target=_send_index, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
            positions[ours] = iter(range(first, len(paths), count))
        while positions:
            for connection in wait(list(positions)):
                assert isinstance(connection, Connection)
                try:
                    received = connection.recv()
                except EOFError:
                    if next(positions.pop(connection), None) is not None:
                        raise ClipkdError(
                            "a process that indexes shards was killed, as for lack of memory. Repeat the command: it "
                            "continues"
                        ) from None
                    continue
                if isinstance(received, ClipkdError):
                    raise received
                for shard in received:
                    yield next(positions[connection]), shard
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _send_index(paths: Sequence[Path], caption_key: str | None, connection: Connection) -> None:
    """Index shards and send them, or the error that ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process, too; the command ends it
    with contextlib.suppress(BrokenPipeError):  # the command was killed
        try:
            for start in range(0, len(paths), _SENT_TOGETHER):
                connection.send([_index_shard(path, caption_key) for path in paths[start : start + _SENT_TOGETHER]])
        except ClipkdError as error:
            connection.send(error)
