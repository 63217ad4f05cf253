"""Check what this machine or a device supports by running each capability in a process that may crash or hang.

A capability is `probes.py` with an argument.  The recipe and the device decide which capabilities are needed; each
failure comes with the command that fixes it.  This module needs only the base install and downloads nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from export.device_programs import probes
from export.device_programs.machine import describe_machine
from export.devices.presets import PRESETS
from export.devices.registry import Device, find_device, is_local, read_devices
from export.devices.ssh import TimedOut, by_hand, run_on
from toolchain.errors import ClipkdError, MissingDependency, UnavailableBackend, UsageError
from toolchain.progress import Progress, no_progress
from toolchain.recipe.recipe import Recipe
from toolchain.runtimes import RUNTIMES, choose_runtime

Row = dict[str, Any]

NOT_INSTALLED, NOT_THERE = 3, 4  # exit statuses of a probe

_PROBES = Path(probes.__file__)
_STATUS = {0: "ok", NOT_INSTALLED: "not installed", NOT_THERE: "not there"}
_GPU = "sudo apt-get install nvidia-driver, then restart (a container: start it with --gpus all)"
_STDERR_CHARACTERS = 300
_SIDE_BY_SIDE = max(2, min(4, os.cpu_count() or 1))  # probes wait for disks and drivers too


@dataclass(frozen=True)
class Capability:
    name: str
    probe: str
    timeout_s: float
    install: str
    """The fix when something is not installed, or installed and broken."""

    driver: str = ""
    """The fix when hardware or a driver is missing."""

    package: str = ""
    """The package to install on a device without clipkd; empty: use `install`."""

    on_devices: bool = False
    """Also probed on devices reached by ssh."""

    is_slow: bool = False
    """Imports PyTorch or builds an engine, which takes several seconds."""


def _runtime(name: str, device: str, timeout_s: float, driver: str = "") -> Capability:
    """Return the capability of running graphs with a runtime on a kind of device."""
    runtime = RUNTIMES[name]
    package = runtime.package or ""
    return Capability(
        f"{name} {device}", f"{name}:{device}", timeout_s, runtime.install, driver, package=package, on_devices=True
    )


CAPABILITIES = (
    Capability("measure", "base", 30, "pip install numpy", package="numpy", on_devices=True),
    Capability("pictures", "pictures", 30, "pip install pillow", package="pillow", on_devices=True),
    Capability("train", "train", 180, "pip install 'clipkd[train]'", is_slow=True),
    Capability("quantize", "quantize", 180, "pip install 'clipkd[train]'", is_slow=True),
    Capability("export", "export", 180, "pip install 'clipkd[train]'", is_slow=True),
    Capability("report", "report", 60, "pip install 'clipkd[report]'"),
    Capability("compile", "compiler", 60, "sudo apt-get install g++"),
    _runtime("onnxruntime", "cpu", 60),
    _runtime("onnxruntime", "cuda", 60, f"{_GPU}; its CUDA libraries: pip install 'onnxruntime-gpu[cuda,cudnn]'"),
    _runtime("openvino", "cpu", 60),
    _runtime(
        *("openvino", "gpu", 120),
        "sudo apt-get install intel-opencl-icd, and membership of the group render (needs Intel graphics)",
    ),
    _runtime("openvino", "npu", 120, "Intel's NPU driver: github.com/intel/linux-npu-driver (needs a Core Ultra)"),
    Capability("nvidia driver", "nvidia", 30, _GPU, _GPU, on_devices=True),
    Capability(
        "tensorrt build",
        "tensorrt",
        180,
        f"{RUNTIMES['tensorrt'].install} (on a Jetson: sudo apt-get install python3-libnvinfer)",
        _GPU,
        on_devices=True,
        is_slow=True,
    ),
)
_BY_NAME = {capability.name: capability for capability in CAPABILITIES}
_ON_DEVICES = tuple(capability.name for capability in CAPABILITIES if capability.on_devices)
_LOCAL_NEEDS = {
    "cpu": ("measure", "pictures", "onnxruntime cpu"),
    "cuda": ("measure", "pictures", "nvidia driver", "onnxruntime cuda"),
    "gpu": ("measure", "pictures", "openvino gpu"),
    "npu": ("measure", "pictures", "openvino npu"),
}


def diagnose(
    recipe: Recipe | None = None,
    device: Device | str | None = None,
    *,
    quick: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Probe all capabilities; return `rows`, one per capability, `left_out` and `machine`.

    Probes of this machine run side by side, the slow ones last; a device is probed meanwhile.  `quick` leaves the slow
    ones out, and `left_out` has their names.

    A row has `capability`, `where` (`here`, or the device's name), `status` (`ok`, `not installed`, `not there`,
    `failed`, `crashed`, `hangs`), `detail` (versions, or the reason), `mend` (the fix, None if ok), `needed` (by the
    recipe or the device) and `took_s`.  `device` is a device reached by ssh, or the name of one of this machine.
    """
    needed_here, needed_there = needs(recipe, device)
    remote = device if isinstance(device, Device) else None
    probed = sorted((each for each in CAPABILITIES if not (quick and each.is_slow)), key=lambda each: each.is_slow)

    def probe_here(capability: Capability) -> list[Row]:
        return [_row(capability, "here", capability.name in needed_here, _probe_here)]

    jobs: list[Callable[[], list[Row]]] = [lambda: _probe_device(remote, needed_there, quick)] if remote else []
    jobs += [partial(probe_here, capability) for capability in probed]
    jobs.append(lambda: [_ssh_client(needed=remote is not None)])
    done = _run_side_by_side(jobs, lambda number: progress("probing", number, len(jobs)))
    rows = [row for found in (done[1:] + done[:1] if remote else done) for row in found]
    left_out = [capability.name for capability in CAPABILITIES if capability not in probed]
    return {"machine": describe_here(), "rows": rows, "left_out": left_out}


def needs(recipe: Recipe | None, device: Device | str | None) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the capabilities that a recipe and a device need: here, and on a remote device."""
    here: set[str] = set()
    runtimes: Iterable[str] = recipe.export.runtimes if recipe is not None else ()
    if recipe is not None:
        here |= {"measure", "pictures", "train", "export", "report", "onnxruntime cpu"}
        if recipe.export.is_quantized:
            here.add("quantize")
        if "compiled" in recipe.profile.pytorch:
            here.add("compile")
    if isinstance(device, Device):
        preset = PRESETS.get(device.preset or "")
        of_device = tuple(runtimes) or ((preset.runtimes[0],) if preset else (choose_runtime("cpu"),))
        there = {"measure", "pictures", *(need for runtime in of_device for need in RUNTIMES[runtime].capabilities)}
        return frozenset(here), frozenset(there)
    here |= {need for runtime in runtimes for need in RUNTIMES[runtime].capabilities}
    if device is not None:
        here |= set(_LOCAL_NEEDS[device.partition(":")[0]])
    return frozenset(here), frozenset()


def problem(rows: list[Row]) -> ClipkdError | None:
    """Return an error that lists the needed capabilities that are not ok, or None."""
    lacking = [row for row in rows if row["needed"] and row["status"] != "ok"]
    if not lacking:
        return None
    kind = UnavailableBackend if all(row["status"] == "not there" for row in lacking) else MissingDependency
    lines = [f"{row['capability']} ({row['where']}): {row['status']}. Fix: {row['mend']}" for row in lacking]
    return kind("needed capabilities are missing:\n" + "\n".join(f"  {line}" for line in lines))


def examine(device: Device) -> dict[str, Any]:
    """Probe a device reached by ssh; return `rows` as `diagnose` does, and `system`, None if it cannot be reached."""
    _, needed = needs(None, device)
    rows = _probe_device(device, needed)
    return {"device": device.name, "system": rows[0].pop("system", None), "rows": rows}


def require(runtime: str, device: Device | str) -> str:
    """Return the version of a runtime on a device, after running a graph of one node there.

    Raises:
        UsageError: the runtime does not run on that device.
        MissingDependency: the runtime is not installed there.
        UnavailableBackend: the device is not there.
    """
    on = device if isinstance(device, Device) else None
    name = "cpu" if on is not None else str(device)
    capability = _BY_NAME.get(f"{runtime} {name.partition(':')[0]}")
    if capability is None:
        raise UsageError(f"{runtime} has no device {name}: cuda:0 needs ONNX Runtime, gpu and npu need OpenVINO")
    probed = replace(capability, probe=f"{runtime}:{name}")
    row = _row(probed, "here", True, _probe_here) if on is None else _row(probed, on.name, True, _prober_on(on))
    if lacking := problem([row]):
        raise lacking
    return str(row["detail"])


def local_devices() -> list[dict[str, str]]:
    """Return the name and description of each device of this machine that some runtime supports."""
    found = [{"name": "cpu", "what": describe_machine()["name"]}]
    status, details, _ = _probe_here("nvidia", 30)
    if status == 0:
        found += [{"name": f"cuda:{index}", "what": name} for index, name in enumerate(details["gpus"])]
    if importlib.util.find_spec("openvino") is not None:
        status, details, _ = _probe_here("openvino:cpu", 60)
        others = zip(details["devices"], details["names"], strict=True) if status == 0 else ()
        found += [{"name": key.lower().replace(".", ":"), "what": name} for key, name in others if key != "CPU"]
    return found


def local_device(name: str) -> dict[str, str]:
    """Return the device of this machine with this name, as listed by `local_devices`; cuda means cuda:0.

    Raises:
        UnavailableBackend: this machine has no such device.
    """
    if name == "cpu":
        return {"name": name, "what": describe_machine()["name"]}
    found = local_devices()
    wanted = name.replace(".", ":")
    for device in found:
        if device["name"] in (wanted, f"{wanted}:0", wanted.removesuffix(":0")):
            return device
    there = ", ".join(device["name"] for device in found)
    raise UnavailableBackend(
        f"this machine has no device {name}; it has: {there}. To see what is missing and how to fix it: clipkd doctor"
    )


def device_named(name: str) -> Device | str:
    """Return the name if it denotes a device of this machine, else the device reached by ssh with this name.

    Raises:
        UsageError: no device has this name.
    """
    return name if is_local(name) and name.partition(":")[0] in _LOCAL_NEEDS else find_device(name)


def describe_here() -> dict[str, Any]:
    """Return `describe_machine`, plus a container's memory limit and the free space where clipkd writes."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    return describe_machine() | {
        "python": sys.version.split()[0],
        "memory_limit_bytes": None if text == "max" else int(text),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "home_free_bytes": shutil.disk_usage(Path.home()).free,
        "devices": sorted(read_devices()),
    }


def _probe_device(device: Device, needed: frozenset[str], quick: bool = False) -> list[Row]:
    """Return a device's rows: `remote`, and its capabilities one after another if it can be reached."""
    reached = _reach(device)
    if reached["status"] != "ok":
        return [reached]
    named = [_BY_NAME[name] for name in _ON_DEVICES]
    return [
        reached,
        *(
            _row(capability, device.name, capability.name in needed, _prober_on(device))
            for capability in named
            if not (quick and capability.is_slow)
        ),
    ]


def _run_side_by_side(jobs: list[Callable[[], list[Row]]], progress: Callable[[int], None]) -> list[list[Row]]:
    """Run jobs in threads, started in order; return their results in the same order.

    Each waits for a process, so threads are enough.  They end with this process: Ctrl-C does not wait for a probe.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    ended: queue.SimpleQueue[tuple[int, list[Row] | Exception]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                ended.put((number, jobs[number]()))
            except Exception as error:
                ended.put((number, error))

    for number in range(len(jobs)):
        waiting.put(number)
    for _ in range(min(len(jobs), _SIDE_BY_SIDE)):
        threading.Thread(target=work, daemon=True).start()
    results: dict[int, list[Row]] = {}
    while len(results) < len(jobs):
        number, result = ended.get()
        if isinstance(result, Exception):
            raise result
        results[number] = result
        progress(len(results))
    return [results[number] for number in range(len(jobs))]


Found = tuple[int | None, dict[str, Any], str]  # status (None: hung), details, the reason
Prober = Callable[[str, float], Found]


def _row(capability: Capability, where: str, needed: bool, probe: Prober) -> Row:
    started = time.monotonic()
    status, details, reason = probe(capability.probe, capability.timeout_s)
    install = capability.install if where == "here" else _install_command_for(capability, where)
    fix = capability.driver or install if status == NOT_THERE else install
    detail = ", ".join(f"{name} {_text(value)}" for name, value in details.items())
    if status is None:
        word, detail = "hangs", f"no result within {capability.timeout_s:g} s"
    elif status < 0:
        word, detail = "crashed", f"ended by {signal.Signals(-status).name}"
    else:
        word = _STATUS.get(status, "failed")
    broken = word in ("failed", "crashed", "hangs")
    return {
        "capability": capability.name,
        "where": where,
        "status": word,
        "detail": detail or reason[-_STDERR_CHARACTERS:],
        "mend": None if status == 0 else fix.replace("pip install", "pip install --force-reinstall") if broken else fix,
        "needed": needed,
        "took_s": round(time.monotonic() - started, 2),
    }


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _install_command_for(capability: Capability, where: str) -> str:
    """Return the command that installs the capability on a device, which has no clipkd."""
    device = read_devices().get(where)
    if device is None or not capability.package:
        return capability.install
    return by_hand(device, device.python, "-m", "pip", "install", capability.package)


def _probe_here(probe: str, timeout_s: float) -> Found:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, str(_PROBES), probe],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None, {}, ""
    return _read_probe(process.returncode, stdout.decode(errors="replace"), stderr.decode(errors="replace"))


def _prober_on(device: Device) -> Prober:
    def probe(name: str, timeout_s: float) -> Found:
        try:
            ended = run_on(device, {_PROBES.name: _PROBES}, _PROBES.name, [name], timeout_s=timeout_s)
        except TimedOut:
            return None, {}, ""
        except ClipkdError as error:
            return 1, {}, str(error)
        return _read_probe(ended.returncode, ended.stdout, ended.stderr)

    return probe


def _read_probe(status: int, stdout: str, stderr: str) -> Found:
    if status == 0:
        details: dict[str, Any] = json.loads(stdout)
        return 0, details, ""
    return status, {}, (stderr.strip().splitlines() or ["(nothing on stderr)"])[-1]


def _reach(device: Device) -> Row:
    """Connect to a device; return the row `remote`."""
    started = time.monotonic()
    row = {"capability": "remote", "where": device.name, "status": "ok", "detail": "", "mend": None, "needed": True}
    try:
        ended = run_on(device, {_PROBES.name: _PROBES}, _PROBES.name, ["system"], timeout_s=60)
        if ended.returncode:
            raise ClipkdError(ended.stderr)
        row["system"] = system = json.loads(ended.stdout)
        row["detail"] = (
            f"{device.destination}: Python {system['python']}, {system['architecture']}, "
            f"{system['memory_bytes'] / 1e9:.1f} GB memory, {system['disk_free_bytes'] / 1e9:.1f} GB free"
        )
    except ClipkdError as error:
        kinds = {MissingDependency: "not installed", UnavailableBackend: "not there"}
        row |= {"status": kinds.get(type(error), "failed"), "detail": str(error).splitlines()[0]}
        row["mend"] = by_hand(device) if type(error) is UnavailableBackend else str(error).splitlines()[0]
    return row | {"took_s": round(time.monotonic() - started, 2)}


def _ssh_client(*, needed: bool) -> Row:
    started = time.monotonic()
    row: Row = {"capability": "ssh", "where": "here", "status": "ok", "mend": None, "needed": needed}
    try:
        done = subprocess.run(["ssh", "-V"], capture_output=True, text=True, timeout=30)
        row["detail"] = done.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        row |= {"status": "not installed", "detail": str(error), "mend": "sudo apt-get install openssh-client"}
    return row | {"took_s": round(time.monotonic() - started, 2)}
