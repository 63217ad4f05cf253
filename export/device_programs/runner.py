"""Time one ONNX graph in a fresh process of any machine, and print one JSON document.

This file is copied to devices and runs there on its own: Python 3.8, numpy and the runtime, which is ONNX Runtime,
OpenVINO or, for an engine, tensorrt and cuda.bindings (Pillow for `--images`).  It exits with status 4 if the device is
missing and 3 if the runtime is missing; it never uses another device instead.  On the machine that trains, it also
times a checkpoint in PyTorch, for reference.

    python runner.py --model image.onnx --input pixel_values --shape 1,3,32,32 --dtype float32 --threads 2

Queries run one at a time, from host array to host array, on different inputs held in memory and used in turn.
`--images` (with `--classes` and `--preprocess`) also times a user's whole path: the bytes of an image file, decoding,
preprocessing, the image tower, features @ class matrix, top-1.

    B batch   N staged inputs   K classes   D feature width   CHW, HWC image   T tokens
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib
import io
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

_NUM_DISTINCT = 64  # random inputs, if no real ones are given
_WINDOWS = 3  # successive medians that must agree for a warm-up to end
_AGREEMENT = 0.05  # largest relative difference at which those medians agree
_ENCODE_BATCH = 8
_SWEEP_LIMIT = 5  # skip a batch of which one query would take more than this many times --min-seconds


def main() -> None:
    options = _parse(sys.argv[1:])
    document = os.dup(1)
    os.dup2(2, 1)  # keeps the output of native libraries out of the document
    try:
        result = _measure(options)
    except (Unavailable, ModuleNotFoundError, EngineError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit({Unavailable: 4, EngineError: 1}.get(type(error), 3))
    with os.fdopen(document, "w", encoding="utf-8") as stdout:
        stdout.write(json.dumps(result) + "\n")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time one ONNX graph and print one JSON document.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--graph", type=Path, help="the ONNX graph that a TensorRT engine was built from")
    parser.add_argument("--input", required=True, help="name of the graph's input")
    parser.add_argument("--shape", type=_shape, required=True, help="shape of one query, for example 1,3,32,32")
    parser.add_argument("--dtype", choices=("float32", "int64"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--runtime", choices=(*_OPEN, "pytorch"), default="onnxruntime")
    parser.add_argument("--compiled", action="store_true", help="use torch.compile, with --runtime pytorch")
    parser.add_argument("--precision", default="fp32", help="precision of the graph, for example fp16")
    parser.add_argument("--device", default="cpu", help="cuda:0 with ONNX Runtime, gpu or npu with OpenVINO")
    parser.add_argument("--min-seconds", type=float, default=1.0, help="seconds to measure after the warm-up")
    parser.add_argument("--max-warm-up", type=float, default=10.0, help="seconds after which an unsteady warm-up ends")
    parser.add_argument("--inputs", type=Path, help="a .npy file of [N, ...] real inputs; default: random numbers")
    parser.add_argument("--encode", action="store_true", help="print the features of all inputs instead of timing")
    parser.add_argument("--batches", type=_shape, default=[], help="also time these batch sizes, for example 8,32")
    parser.add_argument("--images", type=Path, help="a folder of image files: also time the whole path")
    parser.add_argument("--classes", type=Path, help="classes.npz, for --images")
    parser.add_argument("--preprocess", type=Path, help="preprocess.json, for --images")
    parser.add_argument(
        "--spin-ms", type=float, default=0.0, help="milliseconds to add to every query, to test the protocol"
    )
    options = parser.parse_args(arguments)
    if options.model.suffix == ".engine" and options.graph is None:
        parser.error("an engine needs the graph that it was built from: --graph")
    if options.images and not (options.classes and options.preprocess):
        parser.error("--images needs --classes and --preprocess")
    return options


def _shape(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.model.suffix == ".engine":
        start_ns = time.perf_counter_ns()
        graph: Any = open_engine(options.model, options.graph)
        options.runtime = "tensorrt"
    elif options.runtime == "pytorch":
        importlib.import_module("open_clip")
        start_ns = time.perf_counter_ns()
        graph = open_checkpoint(options.model.parent, options.input, compiled=options.compiled, threads=options.threads)
    else:
        _import_runtime(options.runtime)  # the load time excludes the import of the runtime
        start_ns = time.perf_counter_ns()
        graph = open_graph(
            options.model, options.runtime, precision=options.precision, device=options.device, threads=options.threads
        )
    load_ms = (time.perf_counter_ns() - start_ns) / 1e6
    run = _slow_down(graph.run, options.spin_ms) if options.spin_ms else graph.run
    if list(graph.input_shapes) != [options.input]:
        raise SystemExit(f"{options.model}: expected the one input {options.input}, got {list(graph.input_shapes)}")
    if options.encode:
        return {"features": encode_rows(graph, _inputs(options), _ENCODE_BATCH).tolist()}
    single = _queries(options, options.shape[0])

    start_ns = time.perf_counter_ns()
    run(single[0])
    first_ms = (time.perf_counter_ns() - start_ns) / 1e6
    gc.collect()
    gc.disable()
    headline = _time(run, single, options.min_seconds, options.max_warm_up)
    peak_rss_bytes = _peak_rss_bytes()  # the peak never falls, so it is read before larger batches raise it
    result: dict[str, Any] = {"load_ms": load_ms, "first_ms": first_ms, **headline}
    brief = options.min_seconds / 4, options.max_warm_up / 4  # shorter: these timings get no confidence interval
    if options.images:
        end_to_end, files, stages_ns = _end_to_end(run, options)
        result["e2e"] = _time(end_to_end, files, *brief)
        timed_ns = np.array(stages_ns[-len(result["e2e"]["samples_ms"]) :])  # drops those of the warm-up
        medians_ms = np.median(timed_ns, axis=0) / 1e6
        result["e2e"]["stages_ms"] = {stage: float(medians_ms[place]) for place, stage in enumerate(_STAGES)}
        peak_rss_bytes = _peak_rss_bytes()
    typical_ms = float(np.median(headline["samples_ms"])) / options.shape[0]
    result["batches"] = {}
    fixed = fixed_batch(graph)
    for batch in options.batches:
        if fixed is not None and batch != fixed:
            continue
        if batch * typical_ms > _SWEEP_LIMIT * options.min_seconds * 1000:
            continue
        result["batches"][str(batch)] = _time(run, _queries(options, batch), *brief)
    result["peak_rss_bytes"] = peak_rss_bytes
    result["batch"] = options.shape[0]
    result["threads"] = options.threads
    result["versions"] = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        options.runtime: graph.version,
    }
    return result


class Unavailable(Exception):
    """The requested device is missing, or the runtime has no kernels for the precision on it."""


class Graph(NamedTuple):
    """An opened graph with one input and one output."""

    input_shapes: dict[str, list[Any]]
    """Shape of every input by name, with the batch; a dimension that is not a number is free."""

    run: Callable[[Any], Any]
    """Function from a host array to a host array."""

    handle: Any
    """The runtime's own object."""

    version: str


def open_graph(path: Path, runtime: str, *, precision: str | None, device: str, threads: int | None) -> Graph:
    """Open a graph so that it computes in its own precision on the named device, or not at all.

    Raises:
        Unavailable: the device is not there, or lacks kernels for the precision.
        ModuleNotFoundError: the runtime is not installed.
    """
    return _OPEN[runtime](path, precision, device.lower(), threads)


def fixed_batch(graph: Any) -> int | None:
    """Return the batch size that a graph or an engine requires; None if it takes any."""
    ((first, *_),) = graph.input_shapes.values()
    return first if isinstance(first, int) else None


def encode_rows(graph: Any, rows: NDArray[Any], most: int) -> Any:
    """Return the features of rows [B, ...], from runs of up to `most` rows; of one row if the batch is fixed (to 1)."""
    if fixed_batch(graph) is not None:
        most = 1
        if not len(rows):  # the result has no rows, but needs the width
            return graph.run(np.zeros((1, *rows.shape[1:]), rows.dtype))[:0]
    starts = range(0, max(len(rows), 1), most)
    return np.concatenate([graph.run(rows[start : start + most]) for start in starts])


def onnxruntime_options(precision: str | None, threads: int | None) -> Any:
    """Return the session options; all graphs but fp32 and int8 get one optimization level below the highest."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    if precision not in ("fp32", "int8"):  # ENABLE_ALL segfaults on fp16 transformers on a CPU (onnxruntime#26717)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    disabled = []
    if precision in ("int8", "int8-fp16"):  # with a fixed batch it creates products that are computed in floats
        disabled.append("MatMulAddFusion")
    if precision == "int8-fp16":  # it would round biases to a scale (input scale x weight scale) float16 cannot hold
        disabled.append("WeightBiasQuantization")
    if disabled:
        options.add_session_config_entry("optimization.disable_specified_optimizers", ";".join(disabled))
    return options


def _import_runtime(name: str) -> Any:
    """Import a runtime without OpenVINO's telemetry, which would write an identifier to the home folder."""
    hide_reporter = "openvino_telemetry" not in sys.modules
    if hide_reporter:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # its import then raises ImportError
    try:
        return importlib.import_module(name)
    finally:
        if hide_reporter:
            del sys.modules["openvino_telemetry"]


def _open_onnxruntime(path: Path, precision: str | None, device: str, threads: int | None) -> Graph:
    import onnxruntime as ort

    ort.set_default_logger_severity(_ERRORS_ONLY)
    if precision == "int8-bf16":  # it would compute the floats in float32, because the graph stores them so
        raise Unavailable("ONNX Runtime does not support int8-bf16, which needs OpenVINO; export int8 instead")
    kind, _, index = device.partition(":")
    providers = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    provider = providers.get(kind)
    if provider not in ort.get_available_providers():
        there = [name for name, known in providers.items() if known in ort.get_available_providers()]
        raise Unavailable(f"ONNX Runtime {ort.__version__} has no device {device} here, only {there}; {_OTHERWISE}")
    settings = {} if kind == "cpu" else {"device_id": index or "0", "use_tf32": "0"}  # TF32 is not fp32
    if kind == "cuda" and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):  # it prints the libraries that it does not find
            ort.preload_dlls()
    options = onnxruntime_options(precision, threads)
    try:
        session = ort.InferenceSession(str(path), options, providers=[(provider, settings)])
    except Exception as error:
        if "NOT_IMPLEMENTED" not in str(error):
            raise
        lacking = str(error).partition("NOT_IMPLEMENTED : ")[2]
        raise Unavailable(f"ONNX Runtime cannot run this graph in {precision} on {device}: {lacking}") from None
    if session.get_providers()[0] != provider:  # a provider that fails to load leaves a session on the CPU
        raise Unavailable(
            f"ONNX Runtime lists {provider} but runs on {session.get_providers()[0]}: "
            f"a library or the driver of {device} is missing; {_OTHERWISE}"
        )
    session.disable_fallback()
    inputs, output = session.get_inputs(), session.get_outputs()[0].name
    return Graph(
        {entry.name: list(entry.shape) for entry in inputs},
        lambda query: session.run([output], {inputs[0].name: query})[0],
        session,
        ort.__version__,
    )


def _open_openvino(path: Path, precision: str | None, device: str, threads: int | None) -> Graph:
    openvino = _import_runtime("openvino")
    core = openvino.Core()
    kind, _, number = device.partition(":")
    name = f"{kind.upper()}.{number}" if number else kind.upper()
    there = core.available_devices
    if name not in there and not any(known.split(".")[0] == name for known in there):
        raise Unavailable(f"OpenVINO {openvino.__version__} has no device {device} here, only {there}; {_OTHERWISE}")
    able = core.get_property(name, "OPTIMIZATION_CAPABILITIES")
    # Always hint a supported type: without a hint, or with an unsupported f16, a CPU computes fp32 graphs in bfloat16.
    half, brain = ("FP16", "f16"), ("BF16", "bf16")
    wanted = {"fp16": half, "int8-fp16": half, "bf16": brain, "int8-bf16": brain}
    capability, hint = wanted.get(precision or "", ("FP32", "f32"))
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": hint if capability in able else "f32",
    }
    if threads and kind == "cpu":
        settings["INFERENCE_NUM_THREADS"] = threads
    model = core.read_model(str(path))
    # Read before compiling, which may add names.
    names = [parameter.get_friendly_name() for parameter in model.get_parameters()]
    compiled = core.compile_model(model, name, settings)
    request = compiled.create_infer_request()
    shapes = {}
    for index, entry in enumerate(compiled.inputs):
        dimensions = entry.get_partial_shape()
        shapes[names[index]] = [d.get_length() if d.is_static else None for d in dimensions]

    def run(query: NDArray[Any]) -> Any:
        return request.infer([query], share_inputs=True)[0]  # only inputs are shared, outputs are copied

    return Graph(shapes, run, compiled, openvino.__version__.partition("-")[0])


def open_checkpoint(folder: Path, input_name: str, *, compiled: bool, threads: int | None) -> Graph:
    """Open one tower of an open_clip local-dir in PyTorch fp32 on the CPU, loaded and run by plain open_clip.

    Eager mode may use PyTorch's fast paths; `compiled` uses torch.compile with its defaults, which compiles at the
    first query of a shape.
    """
    import logging

    import open_clip
    import torch

    if threads:
        torch.set_num_threads(threads)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # open_clip logs every look-up
    try:
        net = open_clip.create_model("local-dir:" + str(folder.resolve()), pretrained_text=False).eval()
    finally:
        root.setLevel(level)
    encode = net.encode_image if input_name == "pixel_values" else net.encode_text
    if compiled:
        encode = torch.compile(encode)

    def run(query: NDArray[Any]) -> Any:
        with torch.inference_mode():
            return encode(torch.from_numpy(query), normalize=True).numpy()

    return Graph({input_name: [None]}, run, net, torch.__version__)  # any batch size


_ERRORS_ONLY = 3  # ONNX Runtime's logging severity
_OTHERWISE = "choose another device, or install what this one needs"
_OPEN = {"onnxruntime": _open_onnxruntime, "openvino": _open_openvino}


def _time(run: Callable[[Any], Any], queries: Sequence[Any], min_seconds: float, max_warm_up: float) -> dict[str, Any]:
    """Warm up until the medians of successive windows agree, then return the latencies of single queries."""
    window_ns = int(min_seconds / 10 * 1e9)
    medians: list[float] = []
    start_ns = time.perf_counter_ns()
    steady = False
    while not steady and time.perf_counter_ns() - start_ns < max_warm_up * 1e9:
        medians.append(float(np.median(_sample(run, queries, window_ns))))
        last = medians[-_WINDOWS:]
        steady = len(last) == _WINDOWS and max(last) - min(last) <= _AGREEMENT * min(last)
    warm_up_s = (time.perf_counter_ns() - start_ns) / 1e9
    samples_ns = _sample(run, queries, int(min_seconds * 1e9))
    return {"samples_ms": [ns / 1e6 for ns in samples_ns], "steady": steady, "warm_up_s": warm_up_s}


def _sample(run: Callable[[Any], Any], queries: Sequence[Any], duration_ns: int) -> list[int]:
    samples_ns: list[int] = []
    now = time.perf_counter_ns
    end_ns = now() + duration_ns
    done = False
    while not done:
        start_ns = now()
        run(queries[len(samples_ns) % len(queries)])
        stop_ns = now()
        samples_ns.append(stop_ns - start_ns)
        done = stop_ns >= end_ns
    return samples_ns


def _inputs(options: argparse.Namespace) -> NDArray[Any]:
    """Return the real inputs, or random ones, [N, ...]."""
    shape = options.shape[1:]
    if options.inputs is not None:
        inputs: NDArray[Any] = np.load(str(options.inputs), allow_pickle=False)
        if list(inputs.shape[1:]) != shape or inputs.dtype != options.dtype:
            raise SystemExit(
                f"{options.inputs}: expected {options.dtype} inputs of shape {shape}, "
                f"got {inputs.dtype} of {list(inputs.shape[1:])}"
            )
        return inputs
    random = np.random.RandomState(0)
    if options.dtype == "int64":
        return random.randint(0, 256, [_NUM_DISTINCT, *shape]).astype(np.int64)
    return random.standard_normal([_NUM_DISTINCT, *shape]).astype(np.float32)


def _queries(options: argparse.Namespace, batch: int) -> list[NDArray[Any]]:
    """Return distinct queries of one batch size, as separate contiguous arrays."""
    inputs = _inputs(options)
    step = batch if batch < len(inputs) else 1
    first_rows = range(0, step * max(2, len(inputs) // batch), step)
    return [np.ascontiguousarray(inputs[(row + np.arange(batch)) % len(inputs)]) for row in first_rows]


_STAGES = ("decode", "preprocess", "image_tower", "match")


def _end_to_end(
    run: Callable[[Any], Any], options: argparse.Namespace
) -> tuple[Callable[[bytes], int], list[bytes], list[list[int]]]:
    """Return the function for the whole path, its inputs, and a list to which each call adds its stage times (ns).

    The path leads from the bytes of an image file to the label.
    """
    from PIL import Image

    spec = json.loads(options.preprocess.read_text(encoding="utf-8"))["image"]
    with np.load(str(options.classes), allow_pickle=False) as classes:
        features_DK = np.ascontiguousarray(classes["features_KD"].T)
    files = [path.read_bytes() for path in sorted(options.images.iterdir())]
    stages_ns: list[list[int]] = []
    now = time.perf_counter_ns

    def classify(file: bytes) -> int:
        times = [now()]
        image = Image.open(io.BytesIO(file))
        image.load()
        times.append(now())
        pixel_values_CHW = preprocess_image(image, spec)
        times.append(now())
        features_1D = run(pixel_values_CHW[None])
        times.append(now())
        label = int((features_1D @ features_DK).argmax())
        times.append(now())
        stages_ns.append(np.diff(times).tolist())
        return label

    return classify, files, stages_ns


def _slow_down(run: Callable[[Any], Any], spin_ms: float) -> Callable[[Any], Any]:
    """Return `run` with a delay of `spin_ms` added to each call."""

    def slower(query: Any) -> Any:
        result = run(query)
        end_ns = time.perf_counter_ns() + int(spin_ms * 1e6)
        while time.perf_counter_ns() < end_ns:
            pass
        return result

    return slower


def preprocess_image(image: Image.Image, spec: dict[str, Any]) -> NDArray[np.float32]:
    """Return pixel_values [3, H, W] as open_clip.transform.image_transform computes them for evaluation.

    `spec` is an open_clip preprocess_cfg: size, mean, std, interpolation, resize_mode and fill_color.  As in open_clip,
    an image is resized, cropped or padded in its own mode, and converted to RGB only afterwards.
    """
    height, width = as_pair(spec["size"])
    mode, longest = spec["resize_mode"], spec["resize_mode"] == "longest"
    bilinear = spec["interpolation"] == "bilinear"
    old_width, old_height = image.size
    fill = spec.get("fill_color", 0) if longest else 0
    if mode == "squash":
        new_height, new_width = height, width
    elif mode == "shortest" and height == width:  # torchvision's Resize rounds down
        short, long = min(image.size), max(image.size)
        length = int(height * long / short)
        new_height, new_width = (length, height) if old_width <= old_height else (height, length)
    else:  # open_clip's ResizeKeepRatio rounds to nearest, and ignores the interpolation setting for `shortest`
        bilinear = bilinear and longest
        ratios = old_height / height, old_width / width
        ratio = max(ratios) if longest else min(ratios)
        new_height, new_width = round(old_height / ratio), round(old_width / ratio)
    if (new_width, new_height) != image.size:
        # Pillow's constants by value, because the Pillow of Python 3.8 may lack Image.Resampling
        image = image.resize((new_width, new_height), 2 if bilinear else 3)
    if mode != "squash":
        image = _crop_or_pad(image, height, width, fill)
    values_HWC = np.asarray(image.convert("RGB")).astype(np.float32)
    values_HWC /= np.float32(255)
    values_HWC -= np.asarray(as_triple(spec["mean"]), np.float32)
    values_HWC /= np.asarray(as_triple(spec["std"]), np.float32)
    return np.ascontiguousarray(values_HWC.transpose(2, 0, 1))


def _crop_or_pad(image: Image.Image, height: int, width: int, fill: Any) -> Image.Image:
    if width > image.width or height > image.height:
        from PIL import ImageOps

        spare_x, spare_y = max(width - image.width, 0), max(height - image.height, 0)
        border = (spare_x // 2, spare_y // 2, (spare_x + 1) // 2, (spare_y + 1) // 2)
        num_channels = len(image.getbands())
        if num_channels > 1 and not isinstance(fill, (list, tuple)):
            fill = (fill,) * num_channels
        palette = image.getpalette() if image.mode == "P" else None
        image = ImageOps.expand(image, border=border, fill=fill)
        if palette is not None:
            image.putpalette(palette)
    if image.size == (width, height):
        return image
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def as_pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width


def as_triple(value: Any) -> Sequence[float]:
    return value if isinstance(value, (list, tuple)) else (value,) * 3


class EngineError(Exception):
    """An engine may not be opened here, or failed."""


def open_engine(engine: Path, graph: Path) -> EngineSession:
    """Open a TensorRT engine if its engine.json records that clipkd built it on this GPU from exactly this graph.

    Deserializing runs code from the file, so the hash of exactly these bytes is checked first.

    Raises:
        EngineError: no manifest, another graph, other bytes, another TensorRT or another GPU.
        ImportError: tensorrt or cuda.bindings is not installed.
    """
    again = "Build it again with build_on_device.sh of the TensorRT build kit, or with: clipkd export RUN --trt"
    try:
        manifest = json.loads((engine.parent / "engine.json").read_text(encoding="utf-8"))
        tower = engine.stem
        built_from, recorded = manifest["graphs"][tower], manifest["engines"][tower]
        profiles, version = manifest["profiles"][tower], manifest["tensorrt"]
        capability, name = manifest["compute_capability"], manifest["gpu"]
        plan = engine.read_bytes()
        graph_bytes = graph.read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"{engine}: not opened: no valid engine.json shows that clipkd built it ({error!r}). {again}"
        ) from None
    if hashlib.sha256(graph_bytes).hexdigest() != built_from:
        raise EngineError(f"{engine}: not opened: it was built from another graph than {graph}. {again}")
    if hashlib.sha256(plan).hexdigest() != recorded:
        raise EngineError(f"{engine}: not opened: its sha256 differs from the one in engine.json. {again}")
    trt = _tensorrt()
    if trt.__version__ != version:
        raise EngineError(f"{engine}: built by TensorRT {version}; here is {trt.__version__}. {again}")
    cudart = _cudart()
    properties = _cuda(cudart.cudaGetDeviceProperties(0))
    here = properties.name.decode().rstrip("\0"), f"{properties.major}.{properties.minor}"
    if here != (name, capability):
        raise EngineError(f"{engine}: built for {name} ({capability}); here is {here[0]} ({here[1]}). {again}")
    return EngineSession(trt, cudart, plan, profiles)


class EngineSession:
    """An opened TensorRT engine, with the interface of a `Graph`.

    Inputs and outputs are host arrays; device buffers fit the largest batch and are reused.
    """

    def __init__(self, trt: Any, cudart: Any, plan: bytes, profiles: Sequence[Sequence[int]]) -> None:
        self._trt, self._cudart, self._profiles = trt, cudart, profiles
        self._buffers: dict[str, int] = {}
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError("TensorRT cannot deserialize this engine; see its messages above")
        self._stream = _cuda(cudart.cudaStreamCreate())
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        (self._input,) = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        (self._output,) = [name for name in names if modes[name] == trt.TensorIOMode.OUTPUT]
        self._max_batch = max(largest for _, _, largest in profiles)
        self._dtypes = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        for name in names:
            count = self._max_batch * int(np.prod(tuple(self._engine.get_tensor_shape(name))[1:]))
            self._buffers[name] = int(_cuda(cudart.cudaMalloc(count * self._dtypes[name].itemsize)))
        self._contexts = []
        for index in range(len(profiles)):
            context = self._engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(index, self._stream):
                raise EngineError(
                    f"TensorRT cannot create an execution context for profile {index}; is the GPU's memory full?"
                )
            for name, address in self._buffers.items():
                context.set_tensor_address(name, address)
            self._contexts.append(context)
        _cuda(cudart.cudaStreamSynchronize(self._stream))

    @property
    def input_shapes(self) -> dict[str, list[Any]]:
        first, *rest = tuple(self._engine.get_tensor_shape(self._input))
        return {self._input: [None if first < 0 else first, *rest]}

    @property
    def version(self) -> str:
        return str(self._trt.__version__)

    def run(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Return the features of all rows, in runs of at most the engine's largest batch."""
        parts = [self._run(rows[start : start + self._max_batch]) for start in range(0, len(rows), self._max_batch)]
        width = tuple(self._engine.get_tensor_shape(self._output))[1:]
        return np.concatenate(parts) if parts else np.zeros((0, *width), self._dtypes[self._output])

    def _run(self, rows: NDArray[Any]) -> NDArray[Any]:
        kind, cudart = self._cudart.cudaMemcpyKind, self._cudart
        rows = np.ascontiguousarray(rows, self._dtypes[self._input])
        index = next(i for i, (_, _, largest) in enumerate(self._profiles) if len(rows) <= largest)
        context = self._contexts[index]
        if not context.set_input_shape(self._input, tuple(rows.shape)):
            raise EngineError(f"the engine does not take {self._input} of shape {list(rows.shape)}")
        features = np.empty(tuple(context.get_tensor_shape(self._output)), self._dtypes[self._output])
        copy, stream = cudart.cudaMemcpyAsync, self._stream
        to_device, to_host = kind.cudaMemcpyHostToDevice, kind.cudaMemcpyDeviceToHost
        _cuda(copy(self._buffers[self._input], rows.ctypes.data, rows.nbytes, to_device, stream))
        if not context.execute_async_v3(int(stream)):
            raise EngineError("TensorRT did not enqueue the engine; see its messages above")
        _cuda(copy(features.ctypes.data, self._buffers[self._output], features.nbytes, to_host, stream))
        _cuda(cudart.cudaStreamSynchronize(stream))
        return features

    def __del__(self) -> None:
        for address in self._buffers.values():
            self._cudart.cudaFree(address)


def _tensorrt() -> Any:
    import tensorrt

    return tensorrt


def _cudart() -> Any:
    from cuda.bindings import runtime

    return runtime


def _cuda(answer: Any) -> Any:
    """Return the result of a cuda.bindings call without its status; raise if the status is an error."""
    status, *values = answer
    if int(status):
        raise EngineError(f"CUDA: {status!r}")
    return values[0] if values else None


def _peak_rss_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
