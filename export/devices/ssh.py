"""Run a program on a device reached by ssh: copy the files that are not there yet, run it, and return the result.

The user's own OpenSSH connects, with the user's configuration, keys, jump hosts and known hosts.  Each run has one
connection.  Only two quoted words pass through the device's shell: its Python, and a constant that reads `agent.py`
from stdin.  File names, arguments and contents pass through stdin only, so no shell interprets them.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import IO, Any

from export.device_programs import agent
from export.devices.registry import Device
from toolchain.errors import ArtifactError, ClipkdError, MissingDependency, UnavailableBackend, UsageError
from toolchain.filesystem import file_sha256, replacing

SSH_CONFIG = "CLIPKD_SSH_CONFIG"
"""Environment variable with the path of a file that ssh reads instead of ~/.ssh/config."""

TIMEOUT_S = 600.0
"""A program that runs longer counts as hung and is ended."""

_CONNECT_S, _ANSWER_S = 15, 60.0
_MIN_BYTES_PER_S = 20_000  # a slower copy counts as a stuck connection
_TOO_OLD = 97
# It contains double quotes only, because every shell leaves a single-quoted string unchanged.
_BOOTSTRAP = (
    f"import sys;sys.version_info<(3,8) and sys.exit({_TOO_OLD});s=sys.stdin.buffer;"
    'exec(compile(s.read(int(s.readline())),"agent.py","exec"))'
)
_AGENT = Path(agent.__file__)
_CHUNK_BYTES = 1 << 20
_LAST_LINES = 8


@dataclass(frozen=True)
class Ended:
    """Exit status and output of a program that ran on the device."""

    returncode: int
    """Negative: the signal that ended it."""

    stdout: str
    stderr: str
    copied_bytes: int
    """Bytes of the files that were not on the device before."""


@dataclass(frozen=True)
class Fetch:
    """Files to copy back from the device after the program has succeeded."""

    names: Sequence[str]
    """Files that the program writes, or folders of them."""

    into: Path


class TimedOut(ClipkdError):
    """The program did not finish within its time limit."""


def run_on(
    device: Device,
    files: Mapping[str, Path],
    program: str,
    arguments: Sequence[str],
    *,
    timeout_s: float = TIMEOUT_S,
    once: Collection[Path] = (),
    fetch: Fetch | None = None,
    on_line: Callable[[str], None] = lambda line: None,
) -> Ended:
    """Run `program`, one of `files`, with the device's Python, in a fresh folder that contains `files` by name.

    A file that an earlier run copied is not copied again; the device keeps all files except those in `once`.
    `on_line` is called with each line of stderr when it arrives.

    Raises:
        UnavailableBackend: the device cannot be reached, or rejects this user.
        MissingDependency: it has no Python 3.8.
        TimedOut: the program took longer than `timeout_s`.
        ClipkdError: its disk is full, or the connection broke.
    """
    for name in files:
        _relative(name)
    digests = {name: _sha256(path) for name, path in files.items()}
    paths = {sha: files[name] for name, sha in digests.items()}
    sizes = {sha: path.stat().st_size for sha, path in paths.items()}
    request = {
        "nonce": secrets.token_hex(8),
        "workdir": device.workdir,
        "files": digests,
        "sizes": sizes,
        "program": program,
        "arguments": list(arguments),
        "timeout_s": timeout_s,
        "once": [digest for name, digest in digests.items() if files[name] in once],
        "fetch": list(fetch.names) if fetch else [],
    }
    with _connect(device) as link:
        link.send(_AGENT.read_bytes())
        link.send(json.dumps(request).encode())
        link.marker = f"clipkd {request['nonce']} ".encode()
        missing = link.receive(_ANSWER_S)["missing"]
        copying_s = sum(sizes[sha] for sha in missing) / _MIN_BYTES_PER_S
        with link.patience(_ANSWER_S + copying_s):
            copied_bytes = _copy([paths[sha] for sha in missing], link)
        with link.patience(_ANSWER_S + timeout_s + copying_s):
            message, stderr = _read_until_end(link, on_line)
            for name, size in message["files"]:
                link.receive_file((fetch.into if fetch else Path()) / _relative(name), size)
    if message["timed_out"]:
        raise TimedOut(f"{device.name}: the program took longer than {timeout_s:g} s and was ended")
    if message["returncode"] and "No space left on device" in stderr:
        raise _full(device, stderr.splitlines()[-1], None)
    return Ended(message["returncode"], message["stdout"], stderr, copied_bytes)


def _copy(paths: Sequence[Path], link: _Link) -> int:
    """Send the contents of the files, one after another; return the number of bytes sent."""
    copied_bytes = 0
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                link.write(chunk)
                copied_bytes += len(chunk)
    return copied_bytes


def _read_until_end(link: _Link, on_line: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """Return the message that the program has ended, and everything it wrote to stderr."""
    lines: list[str] = []
    message: dict[str, Any] = {}
    while "returncode" not in message:
        message = link.receive()
        if "line" in message:
            lines.append(message["line"])
            on_line(message["line"])
    return message, "\n".join(lines)


def carry(arguments: Sequence[str | Path]) -> tuple[dict[str, Path], list[str]]:
    """Return the files that the path arguments name, by name on the device, and the arguments with those names.

    A folder comes with its files; an engine comes with its engine.json, which records what it was built from.
    """
    files: dict[str, Path] = {}
    words = []
    for index, argument in enumerate(arguments):
        if isinstance(argument, str):
            words.append(argument)
            continue
        place = f"{index}/{argument.name}"
        words.append(place)
        if argument.is_dir():
            files |= {f"{place}/{path.name}": path for path in sorted(argument.iterdir()) if path.is_file()}
        else:
            files[place] = argument
        if argument.suffix == ".engine":
            files[f"{index}/engine.json"] = argument.with_name("engine.json")
    return files, words


def build_engines_on(
    device: Device, kit: Path, out: Path, *, timeout_s: float = 3600.0, on_line: Callable[[str], None]
) -> dict[str, Any]:
    """Build the engines of a TensorRT build kit on the device, copy them to `out`, and return its document.

    A build kit is an exported folder with typed ONNX graphs and the program that builds engines from them.  `on_line`
    is called with each line of the builder's progress.

    Raises:
        MissingDependency, UnavailableBackend: the device has no TensorRT, or no GPU.
        ClipkdError: a graph cannot be built; and see `run_on`.
    """
    build = kit / "build_engine.py"
    if not build.is_file():
        raise ArtifactError(
            f"{kit}: no build_engine.py, so this is not a TensorRT build kit. Make one with: clipkd export RUN --trt"
        )
    files, words = carry(["--kit", kit, "--out", "engines"])
    ended = run_on(
        device,
        {**files, "build_engine.py": build},
        "build_engine.py",
        words,
        timeout_s=timeout_s,
        fetch=Fetch(["engines"], out),
        on_line=on_line,
    )
    if ended.returncode:
        kinds = {3: MissingDependency, 4: UnavailableBackend}
        tail = "\n".join(ended.stderr.splitlines()[-_LAST_LINES:])
        raise kinds.get(ended.returncode, ClipkdError)(f"{device.name}: {kit.name}: no engine was built:\n{tail}")
    for path in list((out / "engines").iterdir()):
        path.replace(out / path.name)
    (out / "engines").rmdir()
    document: dict[str, Any] = json.loads(ended.stdout)
    return document


def ssh_command(device: Device, command: str) -> list[str]:
    """Return an ssh command that never prompts, never forwards, and checks host keys as the user configured."""
    config = os.environ.get(SSH_CONFIG)
    return [
        "ssh",
        *(["-F", config] if config else []),
        *("-T", "-x", "-a"),
        *("-o", "BatchMode=yes"),
        *("-o", f"ConnectTimeout={_CONNECT_S}"),
        *("-o", "ServerAliveInterval=15"),
        *("-o", "ServerAliveCountMax=4"),
        *("-o", "ClearAllForwardings=yes"),
        *("-o", "ControlMaster=no"),  # may use an existing shared connection, but must not start one
        *(["-p", str(device.port)] if device.port else []),
        "--",
        device.destination,
        command,
    ]


def by_hand(device: Device, *words: str) -> str:
    """Return the command line that runs these words on a device when a user types it here."""
    typed = " ".join(map(shlex.quote, words))
    port = ["-p", str(device.port)] if device.port else []
    return shlex.join(["ssh", *port, "--", device.destination, *([typed] if words else [])])


class _Link:
    """One ssh connection with the agent at its other end."""

    def __init__(self, device: Device, process: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
        self._device, self._process, self._stderr = device, process, stderr
        assert process.stdin is not None
        assert process.stdout is not None
        self._in, self._out = process.stdin, process.stdout
        self._answered = self._stuck = False
        self.marker = b""

    def send(self, document: bytes) -> None:
        self.write(b"%d\n" % len(document) + document)

    def write(self, chunk: bytes) -> None:
        try:
            self._in.write(chunk)
            self._in.flush()
        except (BrokenPipeError, ConnectionResetError):
            self._raise_reason()

    def receive(self, seconds: float | None = None) -> dict[str, Any]:
        """Return the next message; raise an error that the agent reports."""
        with self.patience(seconds):
            for line in self._out:
                if line.startswith(self.marker):
                    self._answered = True
                    message: dict[str, Any] = json.loads(line[len(self.marker) :])
                    if message.get("error") == "full":
                        raise _full(self._device, message["message"], message)
                    if "error" in message:
                        raise ClipkdError(f"{self._device.name}: {message['root']}: {message['message']}")
                    return message
        raise self._no_reply_error()

    def receive_file(self, path: Path, size: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, partial.open("wb") as file:
            while size:
                chunk = self._out.read(min(size, _CHUNK_BYTES))
                if not chunk:
                    raise self._no_reply_error()
                file.write(chunk)
                size -= len(chunk)

    @contextmanager
    def patience(self, seconds: float | None) -> Iterator[None]:
        """Close the connection if the block takes longer; that ends the wait in it."""
        if seconds is None:
            yield
            return

        def give_up() -> None:
            self._stuck = True
            self._process.kill()

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _raise_reason(self) -> None:
        while True:  # until a message with the error, or the end of the stream, raises
            self.receive(_ANSWER_S)

    def _no_reply_error(self) -> ClipkdError:
        """Return the error that explains why no message follows, from ssh's exit status and stderr."""
        status = self._process.wait()
        self._stderr.seek(0)
        stderr = self._stderr.read().decode(errors="replace").strip()
        device, typed = self._device, by_hand(self._device)
        last = "\n".join(f"  {line}" for line in stderr.splitlines()[-_LAST_LINES:]) or "  (nothing on stderr)"
        if self._stuck:
            return UnavailableBackend(f"{device.name}: no answer from {device.destination} in time. Try: {typed}")
        if self._answered:
            return ClipkdError(
                f"{device.name}: the connection to {device.destination} broke; the program there was ended and its "
                f"folder removed. Run the command again. Last lines of ssh:\n{last}"
            )
        if status == _TOO_OLD:
            return MissingDependency(
                f"{device.name}: {device.python} is older than Python 3.8. {_other_python(device)}"
            )
        if status in (126, 127):
            return MissingDependency(
                f"{device.name}: {device.python} does not run there. {_other_python(device)}\n{last}"
            )
        if status != 255:
            return ClipkdError(f"{device.name}: {device.python} ended with status {status}:\n{last}")
        return UnavailableBackend(f"{device.name}: {_explain_refusal(stderr, device)}. Try: {typed}\n{last}")


@contextmanager
def _connect(device: Device) -> Iterator[_Link]:
    python = device.python.removeprefix("~/")  # a quoted ~ does not expand; commands start in the home folder
    command = f"exec {shlex.quote(python)} -c {shlex.quote(_BOOTSTRAP)}"
    with tempfile.TemporaryFile() as stderr:  # a shared ssh connection would keep a pipe open
        try:
            process = subprocess.Popen(
                ssh_command(device, command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
            )
        except FileNotFoundError:
            raise MissingDependency(
                f"{device.name}: ssh is not installed. Install it with: sudo apt-get install openssh-client"
            ) from None
        with process:
            try:
                yield _Link(device, process, stderr)
            finally:
                process.kill()  # closes the agent's stdin, so that it ends too
                for stream in (process.stdin, process.stdout):
                    if stream is not None:
                        _close(stream)


def _close(stream: IO[bytes]) -> None:
    try:
        stream.close()
    except (BrokenPipeError, ConnectionResetError):  # the other end is gone, so unwritten bytes are lost anyway
        return


def _explain_refusal(stderr: str, device: Device) -> str:
    host = device.destination.rpartition("@")[2]
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in stderr:
        return (
            f"the host key of {host} differs from the one in known_hosts. If the device was reinstalled, remove the "
            f"old key with ssh-keygen -R; otherwise another machine may be intercepting the connection"
        )
    if "Host key verification failed" in stderr:
        return f"the host key of {host} is not known yet. Connect once by hand and compare the fingerprint"
    if "Permission denied" in stderr:
        return f"{host} does not accept this user without a password. Copy your key there with: ssh-copy-id"
    return f"{host} cannot be reached"


def _other_python(device: Device) -> str:
    return (
        "The device needs Python 3.8 or newer with numpy and a runtime; choose another Python with: "
        f"clipkd devices add {device.name} {device.destination} --python PATH --replace"
    )


def _full(device: Device, message: str, sent: Mapping[str, Any] | None) -> ClipkdError:
    free = sent.get("free_bytes") if sent else None
    left = "" if free is None else f" ({free / 1e6:.0f} MB free at {sent['root'] if sent else ''})"
    return ClipkdError(
        f"{device.name}: its disk is full{left}: {message}. Partial files were removed; free some space, or "
        "choose another folder with: clipkd devices add ... --workdir DIR --replace"
    )


def _relative(name: str) -> Path:
    """Return a file name as a path; reject one that would leave its folder."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise UsageError(f"{name!r}: expected a name inside a folder")
    return Path(*parts)


def _sha256(path: Path) -> str:
    status = path.stat()
    return _cached_sha256(path, status.st_size, status.st_mtime_ns)


@cache
def _cached_sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Return the sha256, cached while the file's size and time stay the same: a profile sends each graph many times."""
    return file_sha256(path)
