"""TensorRT: a kit that builds the engines on the device they will run on, and the engines of this machine.

A kit is an exported folder like any other, whose graphs TensorRT takes as they are, and beside them what a device
without clipkd needs: `build_engine.py`, `build_on_device.sh`, `runner.py`, `SHA256SUMS`, `README.md`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export import build_engine, runner
from export.build_engine import TOWERS, BuildProblem
from export.runtime import ExportedEncoders, open_exported
from toolchain.errors import ArtifactError, ClipkdError, MissingDependency, UnavailableBackend
from toolchain.glyphs import user_cache_folder
from toolchain.stages import file_fingerprint

SUMS = "SHA256SUMS"
_ERRORS: dict[int, type[ClipkdError]] = {1: ClipkdError, 3: MissingDependency, 4: UnavailableBackend}

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
    lines = [f"{file_fingerprint(path)}  {path.name}\n" for path in kept]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def can_build() -> dict[str, str]:
    """The device and TensorRT version that engines would be built with here.

    Raises:
        MissingDependency: TensorRT is not installed, or older than 10.12.
        UnavailableBackend: no NVIDIA driver, or no GPU.
    """
    try:
        return {"tensorrt": build_engine.import_tensorrt().__version__} | build_engine.gpu()
    except BuildProblem as problem:
        raise _ERRORS[problem.exit_code](str(problem)) from None


def build(kit: Path, folder: Path, progress: Callable[[str, int, int], None], *, max_batch: int = 8) -> dict[str, Any]:
    """Write the engines of a kit and engine.json into `folder`; returns the manifest's summary.

    Raises:
        MissingDependency, UnavailableBackend: as `can_build`.
        ClipkdError: TensorRT does not take a graph.
    """
    timing = user_cache_folder() / "tensorrt"
    try:
        made = build_engine.build_engines(kit, folder, max_batch=max_batch, timing_folder=timing, on_progress=progress)
    except BuildProblem as problem:
        raise _ERRORS[problem.exit_code](str(problem)) from None
    size_bytes = sum((folder / f"{tower}.engine").stat().st_size for tower in TOWERS)
    return {"runtime": "tensorrt", "size_bytes": size_bytes} | made


def open_tensorrt(kit: Path, engines: Path) -> ExportedEncoders:
    """A kit's model, its towers running as TensorRT engines.

    Raises:
        ArtifactError: an engine was not built here from the kit's graphs; nothing of it was executed.
        MissingDependency: tensorrt or cuda.bindings is not installed.
    """
    try:
        image, text = (runner.open_engine(engines / f"{tower}.engine", kit / f"{tower}.onnx") for tower in TOWERS)
    except runner.EngineError as error:
        raise ArtifactError(str(error)) from None
    except ImportError as error:
        raise MissingDependency(f"TensorRT engines need {error.name}: pip install tensorrt cuda-python") from None
    return open_exported(kit, towers=(image, text))
