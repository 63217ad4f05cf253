"""Measure ViT-S-16's image tower at batch 1 on this CPU: PyTorch, the stock int8 path, and clipkd's exported models.

    python benchmarks/deploy_latency.py [--model ViT-S-16] [--rounds 5] [--seconds 2] [--threads N]

The sides are:

    PyTorch   eager and torch.compile
    stock     NNCF's default post-training quantization of the ONNX graph, run by OpenVINO with its default settings
    clipkd    each precision in each runtime, opened as exported_model.py opens it; the fastest kinds also as
              `clipkd export --batch 1` makes them, and the fastest of these with `quantize.attention`

Each measurement is a fresh process.  The sides are interleaved; each round draws their order at random.  A ratio is the
median over the rounds, and its interval is a bootstrap over them.  The last line of stdout is one JSON document; the
exit code is 5 if a claim does not hold.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from claims import claim, finish

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from export.device_programs.machine import describe_machine  # noqa: E402
from export.device_programs.runner import open_graph  # noqa: E402
from export.profiling.summary import bootstrap_interval  # noqa: E402

MIN_SPEEDUP, MIN_OVER_STOCK = 3.3, 1.0
OURS = ("onnxruntime fp32", "onnxruntime int8", "onnxruntime int8 batch-1", "openvino fp32", "openvino bf16")
OURS += ("openvino int8", "openvino int8-bf16", "openvino int8-bf16 batch-1", "openvino int8-bf16 attention batch-1")
GEMM = 1024  # rows, columns and depth of the matrix product that measures the machine's peak


def build_tower(model: str) -> Any:
    import torch

    from toolchain.models.build import build_model
    from toolchain.models.towers import ImageTower
    from toolchain.recipe.model import ModelSpec
    from toolchain.recipe.model_names import resolve_model

    built = build_model(resolve_model(ModelSpec(model=model, init="random"), Path(), "student"), seed=0)
    draw = torch.Generator().manual_seed(0)
    for parameter in built.net.parameters():
        if parameter.dim() == 1:  # a graph leaves out a bias of 0 and a gain of 1, which no trained model has
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=draw)
    return built, ImageTower(built.net).eval()


def prepare(model: str, scratch: Path) -> tuple[list[int], float]:
    """Write every graph; return the input's shape and the tower's floating-point operations for one image."""
    import nncf
    import openvino
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from export.graphs.onnx_graph import write_graph
    from export.graphs.precision import prepare_tower
    from toolchain.models.towers import example_pixels, without_attention_fast_path
    from toolchain.quantization.checkpoint import load_quantized
    from toolchain.quantization.freeze import freeze
    from toolchain.quantization.quantize import Calibration, quantize

    built, tower = build_tower(model)
    pixels = example_pixels(built.net).float()
    shown = example_pixels(built.net, 16).float()
    frozen_with = {}
    for attention in (False, True):
        folder = scratch / f"quantized-{attention}"
        folder.mkdir()
        calibration = Calibration(shown, built.tokenize(["a cat", "a dog"]), attention=attention)
        quantize(built, folder, calibration)
        frozen_with[attention] = freeze(load_quantized(folder, built)[0], pixels)
    frozen = frozen_with[False]
    names = ("pixel_values", "image_features")
    with torch.no_grad(), without_attention_fast_path():
        for precision in ("fp32", "bf16", "int8"):
            exported = frozen if precision == "int8" else prepare_tower(tower, pixels, precision)
            opset = 22 if precision == "bf16" else 20
            write_graph(exported, pixels, scratch / f"{precision}.onnx", names_io=names, opset=opset, metadata={})
        write_graph(frozen, pixels, scratch / "int8-batch-1.onnx", names_io=names, opset=20, metadata={}, batch=1)
        for attention, batch, suffix in ((False, None, ""), (False, 1, "-batch-1"), (True, 1, "-attention-batch-1")):
            path = scratch / f"int8-bf16{suffix}.onnx"
            settings = {"names_io": names, "opset": 20, "metadata": {}, "batch": batch, "runtime": "openvino"}
            write_graph(frozen_with[attention], pixels, path, **settings)
        counted = prepare_tower(tower, pixels, "fp32").requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            counted(pixels[:1])
    samples = [sample[None].numpy() for sample in shown]
    stock = nncf.quantize(openvino.Core().read_model(scratch / "fp32.onnx"), nncf.Dataset(samples))
    openvino.save_model(stock, scratch / "stock.xml")
    write_gemms(scratch)
    return [1, *pixels.shape[1:]], float(counter.get_total_flops())


def write_gemms(scratch: Path) -> None:
    """Write two graphs: a matrix product of GEMM x GEMM x GEMM in float32, and the same with 8-bit operands."""
    from onnx import TensorProto, helper, numpy_helper, save

    draw = np.random.default_rng(0)
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [GEMM, GEMM]) for name in ("x", "y")]
    floats = numpy_helper.from_array(draw.standard_normal((GEMM, GEMM)).astype(np.float32), "w")
    bytes_ = numpy_helper.from_array(draw.integers(-127, 128, (GEMM, GEMM), np.int8), "w8")
    scale, zero = numpy_helper.from_array(np.float32(0.03), "s"), numpy_helper.from_array(np.int8(0), "z")
    rounded = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["a"]),
        helper.make_node("DequantizeLinear", ["w8", "s", "z"], ["w"]),
    ]
    product = helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("MatMul", ["a", "w"], ["y"])
    opset = [helper.make_opsetid("", 20)]
    for name, nodes, weights in (
        ("gemm-fp32", [product[0]], [floats]),
        ("gemm-int8", [*rounded, product[1]], [bytes_, scale, zero]),
    ):
        graph = helper.make_graph(nodes, name, io[:1], io[1:], weights)
        save(helper.make_model(graph, opset_imports=opset, ir_version=10), str(scratch / f"{name}.onnx"))


def open_side(side: str, options: argparse.Namespace) -> Callable[[np.ndarray], Any]:
    if side in ("eager", "compile"):
        import torch

        torch.set_num_threads(options.threads)
        tower = build_tower(options.model)[1].requires_grad_(False)
        run = torch.compile(tower) if side == "compile" else tower

        def forward(pixels: np.ndarray) -> Any:
            with torch.inference_mode():
                return run(torch.from_numpy(pixels)).numpy()

        return forward
    if side == "stock":
        import openvino

        settings = {"INFERENCE_NUM_THREADS": options.threads}
        compiled = openvino.Core().compile_model(str(options.scratch / "stock.xml"), "CPU", settings)
        request = compiled.create_infer_request()
        return lambda pixels: request.infer([pixels])[0]
    runtime, precision, *fixed = side.split()
    graph = "-".join([precision, *fixed])
    precision = precision.removeprefix("gemm-")
    path = options.scratch / f"{graph}.onnx"
    return open_graph(path, runtime, precision=precision, device="cpu", threads=options.threads).run


def child(options: argparse.Namespace) -> None:
    """Print the queries' features and median time in this process, after a warm-up as long as the measurement."""
    run, draw = open_side(options.side, options), np.random.default_rng(0)
    queries = [draw.standard_normal(options.shape, np.float32) for _ in range(8)]
    features = np.concatenate([np.asarray(run(query)) for query in queries])
    for measured in (False, True):
        samples_ms, end = [], time.perf_counter() + options.seconds
        while time.perf_counter() < end or len(samples_ms) < 3:
            started = time.perf_counter_ns()
            run(queries[len(samples_ms) % len(queries)])
            samples_ms.append((time.perf_counter_ns() - started) / 1e6)
        if measured:
            print(json.dumps({"ms": statistics.median(samples_ms), "features": features.tolist()}))


def time_side(side: str, shape: list[int], scratch: Path, options: argparse.Namespace) -> tuple[float, np.ndarray]:
    command = [sys.executable, __file__, "--side", side, "--model", options.model, "--scratch", str(scratch)]
    command += ["--seconds", str(options.seconds), "--threads", str(options.threads)]
    command += ["--shape", ",".join(map(str, shape))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: status {done.returncode}\n{done.stderr[-2000:]}")
    document = json.loads(done.stdout.strip().splitlines()[-1])
    return float(document["ms"]), np.array(document["features"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-S-16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=describe_machine()["usable_cores"])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=lambda text: [int(n) for n in text.split(",")], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        child(options)
        return
    sides = ["eager", "compile", "stock", *OURS]
    with tempfile.TemporaryDirectory(prefix="deploy-latency-") as name:
        shape, flops = prepare(options.model, Path(name))
        medians: dict[str, list[float]] = {side: [] for side in sides}
        peaks: dict[str, float] = {}
        for runtime in ("onnxruntime", "openvino"):
            for precision in ("fp32", "int8"):
                took_ms, _ = time_side(f"{runtime} gemm-{precision}", [GEMM, GEMM], Path(name), options)
                peaks[precision] = max(peaks.get(precision, 0.0), 2e-6 * GEMM**3 / took_ms)
        features: dict[str, np.ndarray] = {}
        for round_ in range(options.rounds):
            for side in random.Random(round_).sample(sides, len(sides)):
                took_ms, features[side] = time_side(side, shape, Path(name), options)
                medians[side].append(took_ms)
    print(
        f"measured peaks: fp32 {peaks['fp32']:.0f} GFLOP/s, int8 {peaks['int8']:.0f} GOP/s, {options.threads} threads"
    )
    for side in sides:
        middle, (low, high) = statistics.median(medians[side]), bootstrap_interval(medians[side])
        peak = "int8" if "int8" in side or side == "stock" else "fp32"  # the peak in bf16 is not measured
        share = flops / middle / 1e6 / peaks[peak]
        noise = ((features[side] - features["eager"]) ** 2).sum(-1)
        sqnr_db = (10 * np.log10((features["eager"] ** 2).sum(-1) / np.maximum(noise, 1e-14))).min()
        print(
            f"{side:<38} {middle:8.2f} ms [{low:.2f}, {high:.2f}]  {100 * share:5.1f} % of the {peak} peak  "
            f"worst SQNR to eager {sqnr_db:5.1f} dB"
        )
    best = min(OURS, key=lambda side: statistics.median(medians[side]))
    for runtime in ("onnxruntime", "openvino"):
        fastest = min((s for s in OURS if s.startswith(runtime)), key=lambda s: statistics.median(medians[s]))
        print(f"best in {runtime}: {fastest}")
    ratios, claims = {}, []
    for against, bound in (("eager", MIN_SPEEDUP), ("stock", MIN_OVER_STOCK)):
        by_round = [theirs / ours for theirs, ours in zip(medians[against], medians[best], strict=True)]
        low, high = bootstrap_interval(by_round)
        ratios[against] = {"low": low, "high": high}
        print(f"{against} / {best}: {statistics.median(by_round):.3f} [{low:.3f}, {high:.3f}]")
        claims.append(claim(f"{against} over {best}, median of rounds", statistics.median(by_round), "x", ">=", bound))
    finish("deploy_latency", claims, model=options.model, medians_ms=medians, intervals=ratios, peaks=peaks)


if __name__ == "__main__":
    main()
