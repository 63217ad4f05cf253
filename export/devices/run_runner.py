"""Run `device_programs/runner.py` here or on a device, and return its document or raise an error."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from export.device_programs import runner
from export.device_programs.probes import cpp_compiler
from export.devices.documents import EncodedDocument, RunnerDocument
from export.devices.registry import Device
from export.devices.ssh import TimedOut, by_hand, carry, run_on
from export.model_folder import is_checkpoint
from toolchain.errors import ClipkdError, MissingDependency, UnavailableBackend

TIMEOUT_S = 600.0  # a runner counts as hung after this time plus _TIMES its measured time
_TIMES = 6  # warm-up and measurement, plus a quarter of both for the whole path and for each larger batch
_STDERR_LINES = 8
_OUT_OF_MEMORY = re.compile(
    r"MemoryError|bad_alloc|ALLOC_FAILED|MemoryAllocation|out ?of ?memory|fail\w* to allocate", re.I
)
_KILLED = {"SIGKILL": " (the signal that the system sends when memory runs out)"}
_STATUS = {error.exit_code: error for error in (MissingDependency, UnavailableBackend)}
_RUNNER = Path(runner.__file__)
# The runner's options that name files.
_PATHS = frozenset({"--model", "--graph", "--inputs", "--images", "--classes", "--preprocess"})


class Finished(Protocol):
    """Exit status and output of a runner, run here or on a device."""

    @property
    def returncode(self) -> int: ...

    @property
    def stdout(self) -> str: ...

    @property
    def stderr(self) -> str: ...


def require_compiler() -> None:
    """Check that torch.compile has a C++ compiler, before any work starts.

    Raises:
        MissingDependency: the C++ compiler that torch would call is not installed.
    """
    compiler = cpp_compiler()[0]
    if shutil.which(compiler) is None:
        raise MissingDependency(
            f"torch.compile needs a C++ compiler, and there is no {compiler} on the PATH. Install it with: "
            "sudo apt-get install g++, or set profile.pytorch=[eager]"
        )


def runner_here(folder: Path, tower: str, arguments: list[str]) -> RunnerDocument:
    """Run the runner in a process of its own and return its document; a crash there is an exception here.

    Raises:
        ClipkdError: it crashed or hung.
        UnavailableBackend: the device does not exist.
        MissingDependency: the runtime is not installed.
    """
    command, timeout_s = [sys.executable, str(_RUNNER), *arguments], _timeout_s(arguments)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        stderr = error.stderr or b""
        raise _failure(folder, tower, f"took longer than {timeout_s:g} s", stderr, command) from None
    document: RunnerDocument = _document(folder, tower, done, command)
    return _require_times(document, folder, tower)


def runner_on(
    device: Device, folder: Path, tower: str, arguments: list[str], *, once: Sequence[Path] = ()
) -> RunnerDocument:
    """Copy the files that the arguments name to a device, run the runner there, and return its document.

    The device keeps the files for later runs, except those in `once`.

    Raises:
        ClipkdError: it crashed, hung, or failed; and see `export.devices.ssh.run_on`.
        MissingDependency: the device lacks numpy or the runtime.
    """
    document: RunnerDocument = _run_there(device, folder, tower, arguments, once)
    return _require_times(document, folder, tower)


def encode_on(
    device: Device, folder: Path, tower: str, arguments: list[str], *, once: Sequence[Path] = ()
) -> EncodedDocument:
    """Return the features of all the inputs that the arguments name, computed on a device.

    Raises:
        ClipkdError, MissingDependency: see `runner_on`.
    """
    document: EncodedDocument = _run_there(device, folder, tower, [*arguments, "--encode"], once)
    return document


def _run_there(device: Device, folder: Path, tower: str, arguments: list[str], once: Sequence[Path]) -> Any:
    named = [Path(word) if before in _PATHS else word for before, word in itertools.pairwise(["", *arguments])]
    files, words = carry(named)
    try:
        done = run_on(
            device, {**files, _RUNNER.name: _RUNNER}, _RUNNER.name, words, timeout_s=_timeout_s(arguments), once=once
        )
    except TimedOut as error:
        raise ClipkdError(f"{folder / tower}.onnx: on {error}") from None
    if done.returncode > 0 and "No module named" in done.stderr:
        last = done.stderr.strip().splitlines()[-1]
        runtime = arguments[arguments.index("--runtime") + 1] if "--runtime" in arguments else "onnxruntime"
        raise MissingDependency(
            f"{device.name}: {last.removeprefix('ModuleNotFoundError: ')}. Install it on the device: "
            + by_hand(device, device.python, "-m", "pip", "install", "numpy", runtime, "pillow")
        )
    return _document(folder, tower, done, [sys.executable, str(_RUNNER), *arguments])


def _timeout_s(arguments: Sequence[str]) -> float:
    named = dict(itertools.pairwise(arguments))
    return TIMEOUT_S + _TIMES * float(named.get("--min-seconds", 0))


def _document(folder: Path, tower: str, done: Finished, command: list[str]) -> Any:
    if done.returncode in _STATUS:
        raise _STATUS[done.returncode](f"{_tower_name(folder, tower)}: {done.stderr.strip()}")
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise _failure(folder, tower, f"was killed by {name}{_KILLED.get(name, '')}", done.stderr, command)
    if done.returncode:
        what = "ran out of memory and " if _OUT_OF_MEMORY.search(done.stderr) else ""
        raise _failure(folder, tower, f"{what}exited with status {done.returncode}", done.stderr, command)
    return json.loads(done.stdout)


def _require_times(document: RunnerDocument, folder: Path, tower: str) -> RunnerDocument:
    """Check that latencies are positive numbers: NaN would pass every later comparison."""
    timed = [document["samples_ms"], *(batch["samples_ms"] for batch in document["batches"].values())]
    if not all(samples and all(0 < ms < math.inf for ms in samples) for samples in timed):
        raise ClipkdError(f"{_tower_name(folder, tower)}: a measured time is not a positive number; measure it again")
    return document


def _failure(folder: Path, tower: str, what: str, stderr: str | bytes, command: list[str]) -> ClipkdError:
    text = stderr.decode(errors="replace") if isinstance(stderr, bytes) else stderr
    lines = text.strip().splitlines()[-_STDERR_LINES:] or ["(nothing on stderr)"]
    by_hand = shlex.join(command[: command.index("--inputs")])  # the staged inputs are deleted: it uses random ones
    return ClipkdError(
        f"{_tower_name(folder, tower)}: the process that timed it {what}. Last lines of stderr:\n"
        + "\n".join(f"  {line}" for line in lines)
        + f"\nReproduce with: {by_hand}"
    )


def _tower_name(folder: Path, tower: str) -> str:
    return f"{folder}: {tower} tower" if is_checkpoint(folder) else f"{folder / tower}.onnx"
