"""The machines that models are measured on: this one, and any that ssh reaches, under names of the user's.

A device is three facts: where ssh finds it, its Python, and the folder it may use.  They are kept in devices.json in
the user's configuration folder; keys, jump hosts and known hosts stay where they are, in ssh's own configuration.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from toolchain.errors import UsageError


@dataclass(frozen=True)
class Preset:
    """What a common board supports; None where it depends on what is installed."""

    title: str
    runtimes: tuple[str, ...]
    precisions: tuple[str, ...]
    tensorrt: str | None = None
    """The TensorRT its system software brings."""

    notes: str = ""
    source: str = ""


_JETPACK = "docs.nvidia.com/deeplearning/tensorrt: support matrices of 10.x and 11.x"
_ORIN = "Compute capability 8.7: int8 and fp16, no fp8. Build engines on the device: none is built elsewhere for it. "
_LINEAR = "Of ViTs quantize linear layers only: int8 is then 1.15 times as fast as fp16 (onnxsim#1742, Orin Nano)."
_JETSON_LOCK = "Lock clocks before measuring: sudo nvpmodel -m 0; sudo jetson_clocks."
PRESETS = {
    "jetson-orin-nano": Preset(
        "Jetson Orin Nano, JetPack 6",
        ("tensorrt", "onnxruntime"),
        ("fp32", "fp16", "int8", "int8-fp16"),
        "10",
        f"{_ORIN}{_LINEAR} {_JETSON_LOCK}",
        _JETPACK,
    ),
    "jetson-orin-nx": Preset(
        "Jetson Orin NX, JetPack 6",
        ("tensorrt", "onnxruntime"),
        ("fp32", "fp16", "int8", "int8-fp16"),
        "10",
        f"{_ORIN}{_LINEAR} {_JETSON_LOCK}",
        _JETPACK,
    ),
    "jetson-agx-orin": Preset(
        "Jetson AGX Orin, JetPack 6 (TensorRT 10) or 7.2.2 and newer (TensorRT 11.4.1)",
        ("tensorrt", "onnxruntime"),
        ("fp32", "fp16", "int8", "int8-fp16"),
        "10 or 11, by JetPack",
        f"{_ORIN}{_JETSON_LOCK}",
        _JETPACK,
    ),
    "jetson-xavier-nx": Preset(
        "Jetson Xavier NX, JetPack 5 (its last)",
        ("onnxruntime",),
        ("fp32", "fp16", "int8"),
        "8",
        f"TensorRT 8 lacks the strongly typed networks that clipkd builds (10.12): ONNX Runtime only. {_JETSON_LOCK}",
        "developer.nvidia.com/embedded/jetpack-archive",
    ),
    "raspberry-pi-4": Preset(
        "Raspberry Pi 4 (Cortex-A72)",
        ("onnxruntime",),
        ("fp32", "int8"),
        None,
        "64-bit system only. No dot-product instructions: int8 saves memory rather than time. "
        "Passive cooling throttles: let it soak, and see that vcgencmd get_throttled says 0x0.",
        "ARM Cortex-A72 is ARMv8.0-A: no asimddp in /proc/cpuinfo",
    ),
    "raspberry-pi-5": Preset(
        "Raspberry Pi 5 (Cortex-A76)",
        ("onnxruntime",),
        ("fp32", "fp16", "int8"),
        None,
        "64-bit system. Has dot-product instructions (asimddp). "
        "Wants its active cooler: see that vcgencmd get_throttled says 0x0.",
        "ARM Cortex-A76 is ARMv8.2-A: asimddp and asimdhp in /proc/cpuinfo",
    ),
    "intel-n100": Preset(
        "Intel N100 mini PC",
        ("openvino", "onnxruntime"),
        ("fp32", "fp16", "int8"),
        None,
        "AVX2 and AVX-VNNI, no AVX-512; OpenVINO also drives its graphics (device gpu). Its fan-less boxes throttle.",
        "ark.intel.com: Intel Processor N100",
    ),
    "cuda-server": Preset(
        "Linux machine with an NVIDIA GPU",
        ("tensorrt", "onnxruntime"),
        ("fp32", "fp16", "bf16", "int8", "int8-fp16"),
        None,
        "TensorRT 10.12 or newer. int8 may be slower than fp16 (Model-Optimizer#167: twice, on a T4): measure both. "
        "Lock clocks before measuring: sudo nvidia-smi -pm 1; sudo nvidia-smi -lgc F,F.",
        "docs.nvidia.com/deeplearning/tensorrt: performance best practices",
    ),
}
"""Common boards.  What a preset says informs; what a device can do is found by doing it (`clipkd devices test`)."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_LOCAL = re.compile(r"(cpu|cuda|gpu|npu|auto)([:.]\d+)?")
_USER, _HOST = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_IPV6 = r"[0-9A-Fa-f]*:[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?"
_DESTINATION = re.compile(f"({_USER}@)?({_HOST}|{_IPV6})")
_FORMAT = 1


@dataclass(frozen=True)
class Device:
    """A machine that ssh reaches."""

    name: str
    destination: str
    """USER@HOST, or a host of ssh's configuration."""

    port: int | None = None
    python: str = "python3"
    """A name on the device's PATH, or a path there; one that is not absolute starts at the home folder."""

    preset: str | None = None
    workdir: str | None = None
    """Where copies and runs are kept there; None: ~/.cache/clipkd/device."""


def checked(device: Device) -> Device:
    """The same device, if its fields can be what they say.

    Raises:
        UsageError: a field could be taken for something else: an option of ssh's, another folder, a local device.
    """
    problems = []
    if not _NAME.fullmatch(device.name):
        problems.append(f"name {device.name!r}: expected small letters, digits, '.', '_' and '-'")
    if _LOCAL.fullmatch(device.name):
        problems.append(f"name {device.name!r}: is a device of this machine; choose another")
    if not _DESTINATION.fullmatch(device.destination):
        problems.append(f"destination {device.destination!r}: expected HOST or USER@HOST, as ssh takes it")
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
    """The user's devices by name.

    Raises:
        UsageError: the file is not one that clipkd wrote, or somebody edited it into something else.
    """
    path = config_file()
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        entries = document["devices"]
        found = {name: checked(_device(name, entry)) for name, entry in entries.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: cannot be read as clipkd's devices ({error!r}); mend it or remove it") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}; mend it or remove it") from None
    return found


def add_device(device: Device, *, replace: bool = False) -> None:
    """Keep a device under its name.

    Raises:
        UsageError: a field is wrong, or the name is taken.
    """
    known = read_devices()
    if device.name in known and not replace:
        raise UsageError(
            f"{device.name}: there is a device of this name, {known[device.name].destination}; --replace it"
        )
    _write({**known, device.name: checked(device)})


def remove_device(name: str) -> None:
    """Forget a device; nothing on it is touched.

    Raises:
        UsageError: there is none of this name.
    """
    known = read_devices()
    find_device(name)
    _write({key: device for key, device in known.items() if key != name})


def find_device(name: str) -> Device:
    """The device of a name.

    Raises:
        UsageError: there is none.
    """
    known = read_devices()
    if name not in known:
        raise UsageError(
            f"no device {name!r}; there is {', '.join(sorted(known)) or 'none yet'}. "
            "Add one with: clipkd devices add NAME USER@HOST"
        )
    return known[name]


def is_local(name: str) -> bool:
    """Whether a name is a device of this machine: cpu, cuda:0, gpu, npu."""
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
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps({"format": _FORMAT, "devices": entries}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
