"""Does the measuring protocol tell models apart when they differ, and only then?

    python benchmarks/measuring.py [--model runs/quickstart/exported/teacher-onnxruntime-fp32] [--pairs 20]
                                   [--docs docs/measuring.md]

Pairs of measurements of one exported model's image tower, their processes taking turns as in `clipkd profile A B`: once
both as they are, once with the second slowed by wasting a tenth of its median in every query.  Two are told apart by
the signed-rank test over their turns (toolchain/significance.py).  Then profiles beside programs that keep every core
busy, which must lower the grade.  Last, an independent harness, OpenVINO's benchmark_app, on the same graph of a real
size, with the same threads and precision, in turns with ours.

`--docs` replaces the table between that file's markers, and benchmarks/results/measuring.md.  The last line of stdout
is one JSON document; exit code 5 when a claim does not hold.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from claims import claim, finish

from export.device_programs.machine import describe_machine
from export.devices.run_runner import runner_here
from export.profiling.documents import ProfileDocument
from export.profiling.inputs import RunnerOptions, write_inputs
from export.profiling.protocol import Effort, profile
from toolchain.provenance import machine, revision
from toolchain.significance import differ_significantly, signed_rank

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- measuring: begin -->", "<!-- measuring: end -->"
MAX_FALSE = 2  # of 20 pairs of the same model, told apart
MIN_FOUND = 18  # of 20 pairs with one side a tenth slower
MAX_DISAGREEMENT = 0.05  # of the median, to benchmark_app
SLOWED_BY = 0.10
PROCESSES, SECONDS = 24, 6  # of each measurement
HARNESS_MODEL, HARNESS_ROUNDS, HARNESS_S = "vit_t_16", 5, 2  # what a call of Python's costs is far below 1 % of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart/exported/teacher-onnxruntime-fp32"))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--hogs", type=int, default=10)
    parser.add_argument("--docs", type=Path, help="a file whose table to replace")
    arguments = parser.parse_args()
    p50_ms = statistics.median(pair(arguments.model, 0.0)[0])  # also warms up
    false = count_different(arguments.model, 0.0, arguments.pairs, "the same")
    slowed = count_different(arguments.model, SLOWED_BY * p50_ms, arguments.pairs, "one a tenth slower")
    dropped = count_grade_c_beside_hogs(arguments.model, arguments.hogs)
    disagreement = against_benchmark_app()
    lines = [
        "| check | seen | bound |",
        "|---|---|---|",
        f"| pairs of one model significantly different | {false} of {arguments.pairs} | at most {MAX_FALSE} of 20 |",
        f"| slowed pairs significantly different | {slowed} of {arguments.pairs} | at least {MIN_FOUND} of 20 |",
        f"| profiles graded C beside programs on every core | {dropped} of {arguments.hogs} | all |",
        f"| our p50 to benchmark_app's, {HARNESS_MODEL} | {disagreement:+.1%} | within {MAX_DISAGREEMENT:.0%} |",
    ]
    print("\n".join(["", *lines]))
    if arguments.docs:
        write(arguments.docs, "\n".join(lines), arguments.model.name, p50_ms)
    scale = arguments.pairs / 20
    finish(
        "measuring",
        [
            claim("pairs of one model told apart", false, "pairs", "<=", MAX_FALSE * scale),
            claim("pairs told apart with one side slowed by 10 %", slowed, "pairs", ">=", MIN_FOUND * scale),
            claim("profiles whose grade drops beside CPU hogs", dropped, "profiles", ">=", arguments.hogs),
            claim("distance of our p50 from benchmark_app's", abs(disagreement), "fraction", "<=", MAX_DISAGREEMENT),
        ],
        p50_ms=p50_ms,
    )


def write(docs: Path, table: str, model: str, p50_ms: float) -> None:
    place = machine()
    result = (
        f"{table}\n\n{model}, p50 {p50_ms:.2f} ms, {PROCESSES} processes and {SECONDS:g} s for each measurement; "
        f"{place['cpu']}, {place['cores']} cores, commit `{revision()}`, {time.strftime('%Y-%m-%d')}."
    )
    (ROOT / "benchmarks" / "results" / "measuring.md").write_text(f"# measuring\n\n{result}\n", encoding="utf-8")
    before, rest = docs.read_text(encoding="utf-8").split(BEGIN)
    docs.write_text(f"{before}{BEGIN}\n\n{result}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def count_different(model: Path, spin_ms: float, pairs: int, name: str) -> int:
    """Of so many pairs of measurements of one model, the second side slowed, how many are told apart."""
    found = 0
    for number in range(pairs):
        first, second = pair(model, spin_ms)
        apart = differ_significantly(first, second, in_turns=True)
        found += apart
        ratio = statistics.median(second) / statistics.median(first)
        print(
            f"{name}, pair {number}: p50 ratio {ratio:.3f}, p {signed_rank(first, second):.4f}, told apart: {apart}",
            flush=True,
        )
    return found


def count_grade_c_beside_hogs(model: Path, profiles: int) -> int:
    """Of so many profiles beside programs that keep every core busy, how many have grade C."""
    dropped = 0
    for number in range(profiles):
        beside = beside_hogs(model)
        dropped += beside["grade"] == "C"
        print(f"beside hogs, profile {number}: grade {beside['grade']} {beside['flags']}", flush=True)
    return dropped


def pair(model: Path, spin_ms: float) -> list[list[float]]:
    """The medians of the processes of two sides, in milliseconds."""
    medians: list[list[float]] = [[], []]
    with tempfile.TemporaryDirectory() as scratch:
        threads = describe_machine()["usable_cores"]
        options = RunnerOptions(SECONDS / PROCESSES, threads)
        staged = write_inputs(model, Path(scratch) / "staged", options)["image"]
        command = staged[: staged.index("--images")]  # the tower alone
        for turn in range(PROCESSES):
            for side in (0, 1)[:: -1 if turn % 2 else 1]:
                spin = ["--spin-ms", f"{spin_ms:g}"] if side and spin_ms else []
                medians[side].append(statistics.median(runner_here(model, "image", [*command, *spin])["samples_ms"]))
    return medians


def beside_hogs(model: Path) -> ProfileDocument:
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        return profile(model, Effort(3, 0.6)).document
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def against_benchmark_app() -> float:
    """How far our median of an image tower in OpenVINO is from benchmark_app's: the median of rounds in turns."""
    import torch

    from export.graphs.onnx_graph import write_graph
    from export.graphs.precision import prepare_tower
    from toolchain.models.build import build_model
    from toolchain.models.towers import ImageTower, example_pixels
    from toolchain.recipe.model import ModelSpec
    from toolchain.recipe.model_names import resolve_model

    net = build_model(resolve_model(ModelSpec(model=HARNESS_MODEL, init="random"), Path(), "student"), seed=0).net
    pixels, threads = example_pixels(net).float(), describe_machine()["usable_cores"]
    ratios = []
    with tempfile.TemporaryDirectory() as scratch:
        graph = Path(scratch) / "image.onnx"
        settings = {"names_io": ("pixel_values", "image_features"), "opset": 20, "metadata": {}, "batch": 1}
        with torch.no_grad():
            write_graph(
                prepare_tower(ImageTower(net).eval(), pixels, "fp32"), pixels, graph, runtime="openvino", **settings
            )
        shape = [1, *pixels.shape[1:]]
        command = ["--model", str(graph), "--input", "pixel_values", "--dtype", "float32", "--runtime", "openvino"]
        command += ["--precision", "fp32", "--threads", str(threads), "--shape", ",".join(map(str, shape))]
        command += ["--min-seconds", str(HARNESS_S), "--max-warm-up", str(HARNESS_S)]
        for number in range(HARNESS_ROUNDS):
            ours_ms = statistics.median(runner_here(graph.parent, "image", command)["samples_ms"])
            theirs_ms = benchmark_app(graph, shape[-1], threads)
            ratios.append(ours_ms / theirs_ms)
            print(
                f"benchmark_app, round {number}: ours {ours_ms:.2f} ms, theirs {theirs_ms:.2f}, ratio {ratios[-1]:.3f}",
                flush=True,
            )
    return statistics.median(ratios) - 1


def benchmark_app(graph: Path, size: int, threads: int) -> float:
    command = [str(Path(sys.executable).with_name("benchmark_app")), "-m", str(graph), "-d", "CPU", "-hint", "none"]
    command += ["-nstreams", "1", "-nireq", "1", "-api", "sync", "-nthreads", str(threads), "-infer_precision", "f32"]
    command += ["-shape", f"pixel_values[1,3,{size},{size}]", "-t", str(HARNESS_S)]
    ended = subprocess.run(command, capture_output=True, text=True)
    median = re.search(r"Median:\s+([\d.]+) (ms|us)", ended.stdout)
    if median is None:
        raise SystemExit(f"benchmark_app said no median:\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}")
    return float(median[1]) / (1000 if median[2] == "us" else 1)


if __name__ == "__main__":
    main()
