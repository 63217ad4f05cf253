"""Build TensorRT engines from typed ONNX graphs, on the device that will run them.

This file is copied to devices and runs there on its own: Python 3.8, numpy and TensorRT 10.12 or newer.

    python3 build_engine.py --kit . --out engines --max-batch 8

A TensorRT build kit is an exported folder with typed ONNX graphs and this file.  The graph decides the precision:
networks are strongly typed, no precision flag is set, and TF32 is off, so that fp32 means fp32.  An engine runs only on
the GPU and TensorRT version that built it; engine.json, written last next to the engines, records both, and the graphs
that the engines were built from.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

TOWERS = {"image": "pixel_values", "text": "input_ids"}
ENGINE_MANIFEST = "engine.json"
MIN_TENSORRT = (10, 12)  # the first whose strongly typed networks take Q/DQ and fp16 graphs as they are
INSTALL = "pip install tensorrt (on a Jetson: sudo apt-get install python3-libnvinfer)"

_FORMAT = 1
_LEVEL = 3  # TensorRT's default on its scale of 0 to 5; 0 would ignore the timing cache
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # values of CUdevice_attribute
_TYPICAL_BATCH = 8  # the batch that a profile of many sizes is tuned for

Progress = Callable[[str, int, int], None]


class BuildProblem(Exception):
    """An error that a user can cause, with its exit code: 1 failed, 3 not installed, 4 no device."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def build_engines(
    kit: Path,
    out: Path,
    *,
    max_batch: int = 8,
    workspace_gib: float = 2.0,
    timing_folder: Path,
    on_progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Write image.engine, text.engine and engine.json into `out`; return the content of engine.json.

    Raises:
        BuildProblem: TensorRT or a GPU is missing, TensorRT is too old, or a graph cannot be built.
    """
    trt = import_tensorrt()
    device = gpu()
    out.mkdir(parents=True, exist_ok=True)
    timing_folder.mkdir(parents=True, exist_ok=True)
    (out / ENGINE_MANIFEST).unlink(missing_ok=True)  # its engines are about to be replaced
    manifest: dict[str, Any] = {"format": _FORMAT, "tensorrt": trt.__version__, **device, "tf32": False}
    manifest.update({"graphs": {}, "engines": {}, "profiles": {}})
    timing = timing_folder / timing_file(device, trt.__version__)
    for tower, input_name in TOWERS.items():
        graph = kit / f"{tower}.onnx"
        if not graph.is_file():
            raise BuildProblem(
                f"{graph}: missing from the TensorRT build kit. Make the kit again with: clipkd export RUN --trt"
            )
        graph_bytes = graph.read_bytes()
        plan, sizes = _build_plan(
            trt,
            graph,
            graph_bytes,
            input_name,
            partial(profile_sizes, tower, max_batch),
            timing,
            int(workspace_gib * (1 << 30)),
            _add_tower(on_progress, tower),
        )
        _write(out / f"{tower}.engine", plan)
        manifest["graphs"][tower] = hashlib.sha256(graph_bytes).hexdigest()
        manifest["engines"][tower] = hashlib.sha256(plan).hexdigest()
        manifest["profiles"][tower] = [list(each) for each in sizes]
    _write(out / ENGINE_MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return manifest


def import_tensorrt() -> Any:
    """Import and return the tensorrt module.

    Raises:
        BuildProblem: exit code 3: it is not installed, its libraries do not load, or it is older than 10.12.
    """
    try:
        import tensorrt as trt
    except ImportError as error:  # the package or its libraries are missing
        raise BuildProblem(f"TensorRT cannot be imported here ({error}). Install it with: {INSTALL}", 3) from None
    found = tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[:2])
    if found < MIN_TENSORRT:
        raise BuildProblem(
            f"TensorRT {trt.__version__} is installed; expected 10.12 or newer. Install it with: {INSTALL}", 3
        )
    return trt


def gpu() -> dict[str, str]:
    """Return name, compute capability and driver's CUDA version of the first NVIDIA GPU, read from the driver.

    Raises:
        BuildProblem: exit code 4: no driver, or no GPU.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise BuildProblem(
            "no NVIDIA driver here (libcuda.so.1 does not load); TensorRT needs one and a GPU", 4
        ) from None
    count, version, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        why = f"its cuInit returns error {status}" if status else "it lists none"
        raise BuildProblem(f"no NVIDIA GPU here: the driver is installed, but {why}", 4)
    name = ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    status = (
        cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
        or cuda.cuDriverGetVersion(ctypes.byref(version))
    )
    if status:
        raise BuildProblem(f"the NVIDIA driver does not describe its GPU: error {status}", 4)
    return {
        "gpu": name.value.decode(),
        "compute_capability": f"{major.value}.{minor.value}",
        "driver": f"CUDA {version.value // 1000}.{version.value % 1000 // 10}",
    }


def timing_file(device: dict[str, str], tensorrt_version: str) -> str:
    """Return the name of the timing cache, one for each GPU and TensorRT version: timings do not carry over."""
    words = f"{device['gpu']} sm{device['compute_capability']} tensorrt {tensorrt_version}"
    return re.sub(r"[^a-z0-9.]+", "-", words.lower()) + ".timing"


def profile_sizes(tower: str, max_batch: int, batch: int = -1) -> list[tuple[int, int, int]]:
    """Return the least, typical and largest batch of each optimization profile; `batch` is the graph's, or -1 if free.

    Single images have their own profile, because a profile of many sizes is tuned for its typical size.
    """
    if batch > 0:
        return [(batch, batch, batch)]
    many = (1, min(_TYPICAL_BATCH, max_batch), max_batch)
    return [(1, 1, 1), many] if tower == "image" and max_batch > 1 else [many]


def _build_plan(
    trt: Any,
    graph: Path,
    graph_bytes: bytes,
    input_name: str,
    sizes_of: Callable[[int], list[tuple[int, int, int]]],
    timing: Path,
    workspace_bytes: int,
    on_progress: Progress,
) -> tuple[bytes, list[tuple[int, int, int]]]:
    """Return the engine's bytes, and the least, typical and largest batch of each of its profiles."""
    logger = trt.Logger(trt.Logger.WARNING)
    trt.init_libnvinfer_plugins(logger, "")
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph_bytes):
        errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise BuildProblem(f"{graph}: TensorRT {trt.__version__} rejects this graph: {errors}")
    names = [network.get_input(index).name for index in range(network.num_inputs)]
    if names != [input_name]:
        raise BuildProblem(f"{graph}: expected the one input {input_name}, got {', '.join(names) or 'none'}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    config.builder_optimization_level = _LEVEL
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)
    batch, *rest = tuple(network.get_input(0).shape)
    sizes = sizes_of(batch)
    for least, typical, largest in sizes:
        profile = builder.create_optimization_profile()
        profile.set_shape(input_name, (least, *rest), (typical, *rest), (largest, *rest))
        if config.add_optimization_profile(profile) < 0:
            raise BuildProblem(f"{graph}: TensorRT rejects the batch sizes {least}, {typical}, {largest}")
    known = timing.read_bytes() if timing.is_file() else b""
    cache = config.create_timing_cache(known)
    if known and not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")  # from another driver, so TensorRT measures again
        known = b""
    if not known:
        config.set_timing_cache(cache, ignore_mismatch=False)
    config.progress_monitor = monitor = _monitor(trt, on_progress)
    plan = builder.build_serialized_network(network, config)
    if monitor.problem is not None:
        raise monitor.problem
    if plan is None:
        raise BuildProblem(f"{graph}: TensorRT {trt.__version__} built no engine; see its messages above")
    _write(timing, bytes(config.get_timing_cache().serialize()))
    return bytes(plan), sizes


def _add_tower(on_progress: Progress, tower: str) -> Progress:
    return lambda what, done, total: on_progress(f"{tower}: {what}", done, total)


def _monitor(trt: Any, on_progress: Progress) -> Any:
    """Return an IProgressMonitor that reports the outermost phases; TensorRT calls it from several threads."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # its base is known at run time only
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.problem: BaseException | None = None
            self._lock = threading.Lock()
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                if parent_phase is None:
                    self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                if phase_name in self._steps:
                    try:
                        on_progress(phase_name, step + 1, self._steps[phase_name])
                    except BaseException as error:  # must not unwind through TensorRT: cancel the build, raise it later
                        self.problem = error
                return self.problem is None

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._steps.pop(phase_name, None)

    return Monitor()


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the engines of a TensorRT build kit on this device.")
    parser.add_argument("--kit", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "engines")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--workspace-gib", type=float, default=2.0)
    options = parser.parse_args()
    if options.max_batch < 1:
        parser.error("--max-batch needs at least 1")

    def show(what: str, done: int, total: int) -> None:
        sys.stderr.write(f"\r{what} {done}/{total}        ")
        sys.stderr.flush()

    try:
        manifest = build_engines(
            options.kit,
            options.out,
            max_batch=options.max_batch,
            workspace_gib=options.workspace_gib,
            timing_folder=options.out / "timing",
            on_progress=show,
        )
    except BuildProblem as problem:
        sys.stderr.write(f"error: {problem}\n")
        sys.exit(problem.exit_code)
    sys.stderr.write("\n")
    sys.stdout.write(json.dumps(manifest) + "\n")


if __name__ == "__main__":
    main()
