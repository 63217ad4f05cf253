"""TensorRT: a kit that builds the engines on the device they will run on, and the engines of this machine.

A kit is an exported folder like any other, whose graphs TensorRT takes as they are, and beside them what a device
without clipkd needs: `build_engine.py`, `build_on_device.sh`, `runner.py`, `SHA256SUMS`, `README.md`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from export.device_programs import build_engine, runner
from toolchain.filesystem import file_sha256

SUMS = "SHA256SUMS"

BUILD_SCRIPT = """\
#!/bin/sh
# Build this kit's TensorRT engines on this device:  sh build_on_device.sh [--max-batch N] [--workspace-gib G]
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
cd -- "$here"
sha256sum --check --quiet SHA256SUMS
exec "${PYTHON:-python3}" "$here/build_engine.py" --kit "$here" "$@"
"""

_README = """\
# TensorRT kit

The graphs are typed: what runs in which precision is in them, and no builder flag changes it. An engine belongs to
the GPU and the TensorRT version that built it, so it is built here, on the device:

    sh build_on_device.sh

It checks every file against SHA256SUMS, then writes engines/image.engine, engines/text.engine and
engines/engine.json. `--max-batch N` sets the largest batch (8), `--workspace-gib G` what building may use (2).

## What has to be installed

| device | TensorRT | how |
|---|---|---|
| a Jetson whose JetPack brings TensorRT 10.12 or newer | JetPack's own | `sudo apt-get install python3-libnvinfer` |
| a Jetson with an older JetPack | too old: `build_on_device.sh` says so and exits with 3 | upgrade JetPack |
| a PC or server with an NVIDIA GPU | 10.12 or newer, or 11 | `pip install tensorrt` |

`python3 -c 'import tensorrt; print(tensorrt.__version__)'` says what is there. Building needs Python 3.8 or newer,
TensorRT and the driver; running also needs numpy and `pip install cuda-python`.

Exit codes: 1 failed, 3 TensorRT is missing or too old, 4 there is no driver or no GPU.

## Measuring

    python3 runner.py --model engines/image.engine --graph image.onnx --input pixel_values \\
        --shape 1,3,{height},{width} --dtype float32 --threads 1

An engine is opened only if engine.json beside it says that it was built here, from the graph named, and holds these
bytes: opening one runs code that is in it.
"""


def complete_kit(folder: Path, image_size: tuple[int, int]) -> None:
    """Add to a folder of exported graphs what a device needs to build engines from them."""
    for source in (build_engine.__file__, runner.__file__):
        shutil.copyfile(source, folder / Path(source).name)
    (folder / "build_on_device.sh").write_text(BUILD_SCRIPT, encoding="utf-8")
    (folder / "build_on_device.sh").chmod(0o755)
    height, width = image_size
    (folder / "README.md").write_text(_README.format(height=height, width=width), encoding="utf-8")


def write_sums(folder: Path) -> None:
    """SHA256SUMS of all that is in the folder, in the form that `sha256sum --check` reads."""
    kept = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in (SUMS, "key", "lock"))
    lines = [f"{file_sha256(path)}  {path.name}\n" for path in kept]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
