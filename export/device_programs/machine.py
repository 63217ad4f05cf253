"""Describe the machine behind a latency: hardware, clocks and background load.

This file is copied to devices and runs there on its own: Python 3.8 and its standard library.

    python machine.py --watch-seconds 2
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description="Describe this machine in one JSON document.")
    parser.add_argument(
        "--watch-seconds", type=float, default=0.0, help="seconds for which to measure the CPU load of other programs"
    )
    others = other_cpu_share(parser.parse_args().watch_seconds)
    next(others)
    machine = describe_machine()
    sys.stdout.write(json.dumps({"machine": machine, "other_cpu_share": next(others)}) + "\n")


def describe_machine() -> dict[str, Any]:
    """Return the machine's hardware, clock state and system; unreadable values are None."""
    cpu, affinity = _cpu_model(), sorted(_affinity())
    cores = {_topology(index) for index in affinity}
    quota = _cpu_quota()
    usable = max(1, min(len(cores), math.ceil(quota) if quota else len(cores)))
    governors = {_read(f"{_CPUS}/cpu{index}/cpufreq/scaling_governor") for index in affinity}
    return {
        "name": f"{cpu}, {usable} cores",
        "cpu": cpu,
        "architecture": platform.machine(),
        "cores": len(cores),
        "logical_cores": len(affinity),
        "cpu_quota": quota,
        "usable_cores": usable,
        "isa": _isa(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "governor": next(iter(governors)) if len(governors) == 1 else "mixed",
        "clocks_locked": all(_is_clock_locked(index) for index in affinity),
        "to_lock_clocks": _clock_commands(),
        "os": f"{platform.system()} {platform.release()}",
    }


_CPUS = "/sys/devices/system/cpu"


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))  # macOS


def _topology(index: int) -> tuple[str, str]:
    """Return a key that the hardware threads of one core share."""
    topology = f"{_CPUS}/cpu{index}/topology"
    return _read(f"{topology}/physical_package_id") or "0", _read(f"{topology}/core_id") or str(index)


def _is_clock_locked(index: int) -> bool:
    frequency = f"{_CPUS}/cpu{index}/cpufreq"
    least, greatest = _read(f"{frequency}/scaling_min_freq"), _read(f"{frequency}/scaling_max_freq")
    has_no_turbo = _read(f"{_CPUS}/intel_pstate/no_turbo") == "1" or _read(f"{_CPUS}/cpufreq/boost") == "0"
    is_performance = _read(f"{frequency}/scaling_governor") == "performance"
    return (least is not None and least == greatest) or (is_performance and has_no_turbo)


def _clock_commands() -> list[str]:
    """Return the commands that lock this machine's clocks, for the user to run."""
    if Path("/etc/nv_tegra_release").is_file():
        return ["sudo nvpmodel -m 0", "sudo jetson_clocks"]
    commands = []
    if _read(f"{_CPUS}/cpu0/cpufreq/scaling_governor") is not None:
        commands.append("sudo cpupower frequency-set --governor performance")
    if _read(f"{_CPUS}/intel_pstate/no_turbo") is not None:
        commands.append(f"echo 1 | sudo tee {_CPUS}/intel_pstate/no_turbo")
    elif _read(f"{_CPUS}/cpufreq/boost") is not None:
        commands.append(f"echo 0 | sudo tee {_CPUS}/cpufreq/boost")
    return commands


def _cpu_quota() -> float | None:
    """Return the number of cores that a container may use (cgroup v2), None if there is no limit."""
    quota, _, period = (_read("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    return None if quota == "max" else int(quota) / int(period)


def _cpu_model() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    return _read("/proc/device-tree/model") or platform.processor() or platform.machine()


_X86 = "avx2 fma avx512f avx512_vnni avx_vnni avx512_bf16 avx512_fp16 amx_int8 amx_bf16"
_ARM = "asimd asimddp asimdhp i8mm bf16 sve"


def _isa() -> list[str]:
    """Return the CPU's instruction sets that affect the speed of matrix products in each precision."""
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return [name for name in f"{_X86} {_ARM}".split() if name in value.split()]
    return []


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return None


def other_cpu_share(duration_s: float) -> Iterator[float | None]:
    """Yield None at once, then, `duration_s` later, the share of the machine's CPU time that other programs used."""
    before, started = _other_cpu_seconds(), time.monotonic()
    yield None
    time.sleep(max(0.0, started + duration_s - time.monotonic()))
    after = _other_cpu_seconds()
    if before is None or after is None:
        yield None
        return
    yield max(0.0, after - before) / ((time.monotonic() - started) * (os.cpu_count() or 1))


def _other_cpu_seconds() -> float | None:
    """Return the CPU time used since boot, except by this process; None without /proc/stat."""
    line = (_read("/proc/stat") or "").partition("\n")[0].split()
    if not line:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, line[1:9])
    own = os.times()
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - own.user - own.system - own.children_user - own.children_system


if __name__ == "__main__":
    main()
