"""Complete a TensorRT build kit: the directory from which a device builds the engines that it will run.

A TensorRT build kit is an exported model whose graphs TensorRT reads unchanged, plus the files that a device without
clipkd needs: `build_engine.py`, `build_on_device.sh`, `runner.py`, `SHA256SUMS`, `README.md`.
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
# TensorRT build kit

This directory holds a CLIP model as two ONNX graphs and the scripts that build TensorRT engines from them. A TensorRT
engine runs only with the GPU model and the TensorRT version that built it. Therefore copy this directory to the device
that will run the model, and build the engines there:

    sh build_on_device.sh

The script checks every file against SHA256SUMS, then writes engines/image.engine, engines/text.engine and
engines/engine.json. Options:

- `--max-batch N`: the largest batch size that the engines accept (default 8)
- `--workspace-gib G`: the GPU memory that building may use, in GiB (default 2)

The graphs are strongly typed: they fix the precision of every operation, and no builder flag changes it.

## Requirements

| device | TensorRT | how to install |
|---|---|---|
| Jetson whose JetPack has TensorRT 10.12 or newer | from JetPack | `sudo apt-get install python3-libnvinfer` |
| Jetson with an older JetPack | too old: `build_on_device.sh` stops with exit code 3 | upgrade JetPack |
| PC or server with an NVIDIA GPU | 10.12 or newer, or 11 | `pip install tensorrt` |

`python3 -c 'import tensorrt; print(tensorrt.__version__)'` prints the installed version. Building needs Python 3.8 or
newer, TensorRT and the NVIDIA driver. Running also needs numpy and `pip install cuda-python`.

Exit codes: 1 the build failed, 3 TensorRT is missing or too old, 4 there is no NVIDIA driver or no GPU.

## Measure the latency

    python3 runner.py --model engines/image.engine --graph image.onnx --input pixel_values \\
        --shape 1,3,{height},{width} --dtype float32 --threads 1

Opening an engine runs code that the engine file contains. Therefore runner.py opens an engine only if engine.json next
to it records that it was built on this device from the given graph, and if the file has not changed since.
"""


def complete_kit(folder: Path, image_size: tuple[int, int]) -> None:
    """Add to a folder of exported graphs the files that a device needs to build engines from them."""
    for source in (build_engine.__file__, runner.__file__):
        shutil.copyfile(source, folder / Path(source).name)
    (folder / "build_on_device.sh").write_text(BUILD_SCRIPT, encoding="utf-8")
    (folder / "build_on_device.sh").chmod(0o755)
    height, width = image_size
    (folder / "README.md").write_text(_README.format(height=height, width=width), encoding="utf-8")


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS of every file in the folder, in the format that `sha256sum --check` reads."""
    listed = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in (SUMS, "key", "lock"))
    lines = [f"{file_sha256(path)}  {path.name}\n" for path in listed]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
