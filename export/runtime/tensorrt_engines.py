"""Build and open TensorRT engines on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.device_programs import build_engine, runner
from export.device_programs.build_engine import TOWERS, BuildProblem
from export.runtime.exported_model import ExportedEncoders, open_exported
from toolchain.errors import ArtifactError, ClipkdError, MissingDependency, UnavailableBackend
from toolchain.filesystem import user_cache_folder
from toolchain.progress import Progress

_ERRORS: dict[int, type[ClipkdError]] = {1: ClipkdError, 3: MissingDependency, 4: UnavailableBackend}


def can_build() -> dict[str, str]:
    """Return the device and the TensorRT version that would build engines on this machine.

    Raises:
        MissingDependency: TensorRT is not installed, or older than 10.12.
        UnavailableBackend: no NVIDIA driver, or no GPU.
    """
    try:
        return {"tensorrt": build_engine.import_tensorrt().__version__} | build_engine.gpu()
    except BuildProblem as problem:
        raise _ERRORS[problem.exit_code](str(problem)) from None


def build(kit: Path, folder: Path, progress: Progress, *, max_batch: int = 8) -> dict[str, Any]:
    """Write the engines of a TensorRT build kit and engine.json into `folder`; return the manifest's summary.

    Raises:
        MissingDependency, UnavailableBackend: as `can_build`.
        ClipkdError: TensorRT rejects a graph.
    """
    timing = user_cache_folder() / "tensorrt"
    try:
        made = build_engine.build_engines(kit, folder, max_batch=max_batch, timing_folder=timing, on_progress=progress)
    except BuildProblem as problem:
        raise _ERRORS[problem.exit_code](str(problem)) from None
    size_bytes = sum((folder / f"{tower}.engine").stat().st_size for tower in TOWERS)
    return {"runtime": "tensorrt", "size_bytes": size_bytes} | made


def open_tensorrt(kit: Path, engines: Path) -> ExportedEncoders:
    """Open a build kit's model with its towers as TensorRT engines.

    Raises:
        ArtifactError: an engine was not built here from the kit's graphs; none of its code was executed.
        MissingDependency: tensorrt or cuda.bindings is not installed.
    """
    try:
        image, text = (runner.open_engine(engines / f"{tower}.engine", kit / f"{tower}.onnx") for tower in TOWERS)
    except runner.EngineError as error:
        raise ArtifactError(str(error)) from None
    except ImportError as error:
        raise MissingDependency(f"TensorRT engines need {error.name}: pip install tensorrt cuda-python") from None
    return open_exported(kit, towers=(image, text))
