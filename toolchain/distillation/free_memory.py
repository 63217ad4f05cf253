"""Read how much memory a process can still allocate: of a GPU, of the machine, and of its control group."""

import os
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that this process can still allocate on its device, in bytes; None if it is unknown.

    On a CPU it is the machine's available memory, or what the control group still allows if that is less, divided by
    the number of ranks on this machine.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    found = [_read_available(Path("/proc/meminfo")), _read_cgroup(_CGROUP)]
    known = [value for value in found if value is not None]
    return min(known) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if known else None


def _read_available(path: Path) -> int | None:
    """Return the available memory of the machine, from Linux's /proc/meminfo."""
    try:
        lines = dict(line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def _read_cgroup(folder: Path) -> int | None:
    """Return the bytes that a control group (version 2) still allows; its file cache counts as free."""
    try:
        limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(limit) - int(used) + int(stat["inactive_file"])
    except (OSError, KeyError, ValueError):  # no such group, or "max": no limit
        return None
