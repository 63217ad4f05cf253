"""Tables that `clipkd doctor` and `clipkd devices` print."""

from collections.abc import Iterable, Mapping
from typing import Any

from export.devices.presets import PRESETS
from export.devices.registry import Device
from toolchain.text_table import TextTable


def capabilities_table(document: Mapping[str, Any]) -> TextTable:
    """Return a table with a row per capability, and the command that fixes a missing one."""
    rows = [
        [
            "needed" if row["needed"] else "",
            row["capability"],
            row["where"],
            row["status"],
            row["detail"] + (f"\n-> {row['mend']}" if row["mend"] else ""),
        ]
        for row in document["rows"]
    ]
    return TextTable(["", "capability", "where", "status", "detail"], rows, no_wrap=["capability"])


def machine_lines(machine: Mapping[str, Any] | None) -> list[str]:
    """Return two lines about a machine: processor, then memory, disk and system; an empty list for None."""
    if machine is None:
        return []
    quota = f", quota {machine['cpu_quota']:g} cores" if machine["cpu_quota"] else ""
    limit = machine["memory_limit_bytes"]
    memory = f"{machine['memory_bytes'] / 1e9:.1f} GB" + (f", limit {limit / 1e9:.1f} GB" if limit else "")
    return [
        f"{machine['name']}{quota}; {' '.join(machine['isa'])}; governor {machine['governor'] or 'unknown'}",
        f"memory {memory}; free: {machine['disk_free_bytes'] / 1e9:.1f} GB in this folder, "
        f"{machine['home_free_bytes'] / 1e9:.1f} GB in the home folder; {machine['os']}; Python {machine['python']}",
    ]


def presets_table() -> TextTable:
    """Return a table of the known boards and what each supports."""
    rows = [
        [
            name,
            preset.title,
            ", ".join(preset.runtimes),
            preset.tensorrt or "-",
            ", ".join(preset.precisions),
            preset.notes,
        ]
        for name, preset in PRESETS.items()
    ]
    return TextTable(["preset", "board", "runtimes", "TensorRT", "precisions", "notes"], rows, no_wrap=["preset"])


def devices_table(local: Iterable[Mapping[str, str]], remote: Iterable[Device]) -> TextTable:
    """Return a table of the devices of this machine, then those reached by ssh."""
    rows = [[found["name"], "here", found["what"]] for found in local]
    rows += [[device.name, device.destination, device.preset or "-"] for device in remote]
    return TextTable(["device", "where", "what"], rows)
