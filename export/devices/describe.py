"""Describe a device or this machine: hardware, clocks, and the share of CPU time that other programs take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from export.device_programs import machine as machine_program
from export.device_programs.machine import describe_machine, other_cpu_share
from export.devices.documents import DeviceIdentity, Machine, MachineDocument
from export.devices.registry import Device
from export.devices.run_runner import TIMEOUT_S
from export.devices.ssh import run_on
from toolchain.errors import ClipkdError

_LOOK_AROUND_S = 1.0  # seconds for which the load of other programs is measured before the start
_GPU_CLOCKS = ("sudo nvidia-smi -pm 1", "sudo nvidia-smi -lgc F,F  # F in MHz: nvidia-smi -q -d SUPPORTED_CLOCKS")
_MACHINE = Path(machine_program.__file__)


def add_clocks(kind: str, machine: Machine) -> Machine:
    """Return the machine with the clock state of its CPU and of the kind of device that computes."""
    is_jetson = "sudo jetson_clocks" in machine["to_lock_clocks"]  # the command also locks the GPU's clocks
    if kind == "cpu" or is_jetson:
        return machine
    of_cpu = [] if machine["clocks_locked"] else machine["to_lock_clocks"]
    to_lock_clocks = [*of_cpu, *(_GPU_CLOCKS if kind == "cuda" else ())]
    return {**machine, "clocks_locked": False, "to_lock_clocks": to_lock_clocks}


def look_at(on: Device | None) -> tuple[Machine, Iterator[float | None]]:
    """Return a description of `on` (None: this machine), and the iterator of `other_cpu_share` for it."""
    if on is None:
        return cast(Machine, describe_machine()), other_cpu_share(_LOOK_AROUND_S)
    document = _describe(on, _LOOK_AROUND_S)
    return document["machine"], iter([None, document["other_cpu_share"]])


def describe_device(device: Device | None) -> DeviceIdentity:
    """Return the facts of a device (None: this machine) that stay the same from one measurement to the next."""
    machine = cast(Machine, describe_machine()) if device is None else _describe(device, 0.0)["machine"]
    identity: DeviceIdentity = {
        "name": machine["name"],
        "architecture": machine["architecture"],
        "cpu_quota": machine["cpu_quota"],
    }
    return identity if device is None else {"destination": device.destination, **identity}


def _describe(device: Device, watch_seconds: float) -> MachineDocument:
    words = ["--watch-seconds", f"{watch_seconds:g}"]
    done = run_on(device, {_MACHINE.name: _MACHINE}, _MACHINE.name, words, timeout_s=TIMEOUT_S)
    if done.returncode:
        raise ClipkdError(f"{device.name}: cannot describe the machine:\n{done.stderr}")
    document: MachineDocument = json.loads(done.stdout)
    return document
