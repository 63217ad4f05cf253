"""Run one program on this machine for a clipkd on another machine, over the stdin and stdout of ssh.

`devices/ssh.py` sends this file and runs it here: Python 3.8 and its standard library.  stdin has a line with the
length of a request in JSON, then the request, then the bytes of the files that the answer listed as missing.  stdout
has lines of `clipkd NONCE {...}`; the nonce separates them from anything that a login shell prints.

    files/    copied files, each under its sha256; deleted when unused for a month
    runs/     a folder for each run, held by a lock; a folder whose lock is free belongs to a dead run and is deleted

The folder of a run is deleted when the program ends or times out, and when stdin ends, which is a dropped connection.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

_MONTH_S = 30 * 24 * 3600
_CHUNK_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PR_SET_PDEATHSIG = 1


class _Out:
    """A writer of messages and files to stdout, one at a time."""

    def __init__(self, stream: BinaryIO, nonce: str) -> None:
        self._stream, self._nonce, self._lock = stream, nonce, threading.Lock()

    def send(self, **message: Any) -> None:
        with self._lock:
            self._stream.write(b"\nclipkd %s %s\n" % (self._nonce.encode(), json.dumps(message).encode()))
            self._stream.flush()

    def send_file(self, path: Path) -> None:
        with self._lock, path.open("rb") as file:
            shutil.copyfileobj(file, self._stream, _CHUNK_BYTES)
            self._stream.flush()


def main() -> None:
    source = sys.stdin.buffer
    request = json.loads(source.read(int(source.readline())).decode())
    out = _Out(sys.stdout.buffer, request["nonce"])
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(1))
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = Path(request["workdir"] or home + "/clipkd/device").expanduser()
    try:
        _serve(request, root, source, out)
    except OSError as error:
        if isinstance(error, (BrokenPipeError, ConnectionResetError)):
            sys.exit(1)  # the other end is gone, and the folder of the run is already deleted
        kind = "full" if error.errno in _FULL else "other"
        out.send(error=kind, message=str(error), root=str(root), free_bytes=_free_bytes(root))


def _serve(request: dict[str, Any], root: Path, source: BinaryIO, out: _Out) -> None:
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    (root / "files").mkdir(exist_ok=True)
    (root / "runs").mkdir(exist_ok=True)
    with (root / "lock").open("a") as exclusive:
        fcntl.lockf(exclusive, fcntl.LOCK_EX)
        _sweep(root)
        scratch = Path(tempfile.mkdtemp(prefix="run-", dir=str(root / "runs")))
        held = (scratch / "lock").open("a")
        fcntl.lockf(held, fcntl.LOCK_EX)
    try:
        _receive(request, root, scratch, source, out)
        work = scratch / "work"
        for name, sha in request["files"].items():
            _link(root / "files" / sha, work / name)
        for sha in request["once"]:
            with contextlib.suppress(FileNotFoundError):
                (root / "files" / sha).unlink()
        _run(request, root, work, out)
    finally:
        shutil.rmtree(str(scratch), ignore_errors=True)
        held.close()


def _sweep(root: Path) -> None:
    for scratch in (root / "runs").iterdir():
        try:
            with (scratch / "lock").open("r+") as lock:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            pass
        except OSError:
            continue  # a live run holds the lock
        _end_strays(scratch)
        shutil.rmtree(str(scratch), ignore_errors=True)
    for file in (root / "files").iterdir():
        if time.time() - file.stat().st_mtime > _MONTH_S:
            file.unlink()


def _end_strays(scratch: Path) -> None:
    """Kill processes that a dead run's program left behind: those whose working directory is in its folder (Linux)."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            cwd = os.readlink(str(process / "cwd"))  # noqa: PTH115  # Path.readlink needs Python 3.9
            if scratch.resolve() in Path(cwd).parents:
                os.kill(int(process.name), signal.SIGKILL)


def _receive(request: dict[str, Any], root: Path, scratch: Path, source: BinaryIO, out: _Out) -> None:
    missing = []
    for sha, size in request["sizes"].items():
        file = root / "files" / sha
        if file.is_file() and file.stat().st_size == size:
            os.utime(str(file))
        else:
            missing.append(sha)
    out.send(missing=missing)
    for sha in missing:
        left, digest, incoming = request["sizes"][sha], hashlib.sha256(), scratch / "incoming"
        with incoming.open("wb") as file:
            while left:
                chunk = source.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise BrokenPipeError("the connection ended")
                file.write(chunk)
                digest.update(chunk)
                left -= len(chunk)
        if digest.hexdigest() != sha:
            raise OSError("a file changed while it was copied")
        incoming.chmod(0o500)  # programs get hard links to this file and must not change it
        incoming.replace(root / "files" / sha)


def _link(blob: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(str(blob), str(path))
    except OSError:  # a file system without hard links
        shutil.copyfile(str(blob), str(path))


def _run(request: dict[str, Any], root: Path, work: Path, out: _Out) -> None:
    """Run the program in `work`; send its stderr line by line, and its result when it has ended."""
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, str(work / request["program"])] + request["arguments"]
    child = subprocess.Popen(
        command,
        cwd=str(work),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    timed_out, gone = threading.Event(), threading.Event()
    said: list[bytes] = []

    def end(why: threading.Event) -> None:
        why.set()
        _kill(child)

    def watch() -> None:
        if not os.read(0, 1):
            end(gone)

    timer = threading.Timer(request["timeout_s"], end, [timed_out])
    timer.daemon = True
    timer.start()
    threading.Thread(target=watch, daemon=True).start()
    assert child.stdout is not None
    assert child.stderr is not None
    reader = threading.Thread(target=lambda stream: said.append(stream.read()), args=[child.stdout])
    reader.start()
    try:
        pending = b""
        while True:
            chunk = os.read(child.stderr.fileno(), 1 << 16)
            if not chunk:
                break
            *lines, pending = re.split(b"[\r\n]+", pending + chunk)
            for line in filter(None, lines):
                out.send(line=line.decode("utf-8", "replace"))
        if pending:
            out.send(line=pending.decode("utf-8", "replace"))
        child.wait()
    finally:
        _kill(child)  # also kills the processes that it started
        child.wait()
        reader.join()
        timer.cancel()
    if gone.is_set():
        raise BrokenPipeError("the connection ended")
    fetched = [] if child.returncode else _files(work, request["fetch"])
    sizes = [[path.relative_to(work).as_posix(), path.stat().st_size] for path in fetched]
    stdout = said[0].decode("utf-8", "replace")
    out.send(returncode=child.returncode, timed_out=timed_out.is_set(), stdout=stdout, files=sizes)
    for path in fetched:
        out.send_file(path)


def _files(work: Path, names: list[str]) -> list[Path]:
    found = []
    for name in names:
        path = work / name
        found += sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    return found


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _die_with_parent() -> None:
    """Ask the kernel to kill the program if this process dies first."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_bytes(root: Path) -> int | None:
    try:
        return shutil.disk_usage(str(root)).free
    except OSError:
        return None


if __name__ == "__main__":
    main()
