"""Read and write the user's list of devices: machines reached by ssh, each under a name that the user chose.

A device has three facts: its ssh destination, its Python, and the folder that clipkd may use there.  They are stored in
devices.json in the user's configuration folder; keys, jump hosts and known hosts stay in ssh's own configuration.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from export.devices.presets import PRESETS
from toolchain.errors import UsageError
from toolchain.filesystem import write_json
from toolchain.user_documents import InvalidDocument, decode_document, parse_json

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_LOCAL = re.compile(r"(cpu|cuda|gpu|npu|auto)([:.]\d+)?")
_USER, _HOST = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_IPV6 = r"[0-9A-Fa-f]*:[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?"
_DESTINATION = re.compile(f"({_USER}@)?({_HOST}|{_IPV6})")
_FORMAT = 1


@dataclass(frozen=True)
class Device:
    """A machine reached by ssh."""

    name: str
    destination: str
    """USER@HOST, or a host of ssh's configuration."""

    port: int | None = None
    python: str = "python3"
    """A name on the device's PATH, or a path there; a relative path starts at the home folder."""

    preset: str | None = None
    workdir: str | None = None
    """Folder on the device for copied files and runs; None: ~/.cache/clipkd/device."""


def check_device(device: Device) -> Device:
    """Return the same device if all its fields are valid.

    Raises:
        UsageError: a field could be read as something else: an option of ssh, another folder, a local device.
    """
    problems = []
    if not _NAME.fullmatch(device.name):
        problems.append(f"name {device.name!r}: expected lower-case letters, digits, '.', '_' and '-'")
    if _LOCAL.fullmatch(device.name):
        problems.append(f"name {device.name!r}: reserved for a device of this machine; choose another name")
    if not _DESTINATION.fullmatch(device.destination):
        problems.append(f"destination {device.destination!r}: expected HOST or USER@HOST, as for ssh")
    if device.port is not None and not 0 < device.port < 1 << 16:
        problems.append(f"port {device.port}: expected 1 to 65535")
    if device.preset is not None and device.preset not in PRESETS:
        problems.append(f"preset {device.preset!r}: expected one of {', '.join(PRESETS)}")
    for what, path in (("python", device.python), ("workdir", device.workdir)):
        if path is not None and (not path or path.startswith("-") or not path.isprintable()):
            problems.append(f"{what} {path!r}: expected a path on the device")
    if problems:
        raise UsageError("; ".join(problems))
    return device


def config_file() -> Path:
    root = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(root) / "clipkd" / "devices.json"


def read_devices() -> dict[str, Device]:
    """Return the user's devices by name.

    Raises:
        UsageError: the file is not a valid device list.
    """
    path = config_file()
    try:
        document = parse_json(decode_document(path.read_bytes()))
        entries = document["devices"]
        found = {name: check_device(_device(name, entry)) for name, entry in entries.items()}
    except FileNotFoundError:
        return {}
    except InvalidDocument as error:
        raise UsageError(f"{path}: {error}; fix or delete the file") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not a valid device list ({error!r}); fix or delete the file") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}; fix or delete the file") from None
    return found


def add_device(device: Device, *, replace: bool = False) -> None:
    """Store a device under its name.

    Raises:
        UsageError: a field is invalid, or the name exists and `replace` is False.
    """
    known = read_devices()
    if device.name in known and not replace:
        raise UsageError(
            f"{device.name}: a device with this name exists ({known[device.name].destination}); "
            "replace it with --replace"
        )
    _write({**known, device.name: check_device(device)})


def remove_device(name: str) -> None:
    """Remove a device from the list; nothing on the device changes.

    Raises:
        UsageError: no device has this name.
    """
    known = read_devices()
    find_device(name)
    _write({key: device for key, device in known.items() if key != name})


def find_device(name: str) -> Device:
    """Return the device with this name.

    Raises:
        UsageError: no device has this name.
    """
    known = read_devices()
    if name not in known:
        raise UsageError(
            f"no device {name!r}; known devices: {', '.join(sorted(known)) or 'none'}. "
            "Add one with: clipkd devices add NAME USER@HOST"
        )
    return known[name]


def is_local(name: str) -> bool:
    """Return True if a name denotes a device of this machine: cpu, cuda:0, gpu, npu."""
    return _LOCAL.fullmatch(name) is not None


def _device(name: str, entry: Mapping[str, Any]) -> Device:
    device = Device(name=name, **entry)
    for field in fields(device):
        value = getattr(device, field.name)
        kinds = (int, type(None)) if field.name == "port" else (str, type(None))
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise TypeError(f"{name}.{field.name}: {value!r}")
    return device


def _write(devices: Mapping[str, Device]) -> None:
    path = config_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {name: {k: v for k, v in asdict(device).items() if k != "name"} for name, device in devices.items()}
    write_json(path, {"format": _FORMAT, "devices": entries})
