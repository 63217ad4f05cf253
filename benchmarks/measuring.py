"""Test the measuring protocol: it must find two models significantly different if they differ, and only then.

    python benchmarks/measuring.py [--model runs/quickstart/exported/teacher-onnxruntime-fp32] [--pairs 20]
                                   [--docs docs/measuring.md]

The script runs four checks:

    1. pairs of measurements of one exported model's image tower, their processes interleaved as `clipkd profile A B`
       interleaves them; the signed-rank test over the rounds compares the two (toolchain/significance.py)
    2. the same with the second slowed: a busy loop makes each query longer by a tenth of the median
    3. profiles while other programs keep every core busy, which must lower the grade
    4. OpenVINO's benchmark_app as an independent harness, on a graph of real size, with the same threads and precision,
       interleaved with clipkd's measurements

`--docs` replaces the table between that file's markers, and benchmarks/results/measuring.md.  The last line of stdout
is one JSON document; the exit code is 5 if a claim does not hold.
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
from typing import NamedTuple

from claims import claim, finish
from pages import replace_section

from export.device_programs.machine import describe_machine
from export.devices.run_runner import runner_here
from export.profiling.documents import ProfileDocument
from export.profiling.inputs import RunnerOptions, write_inputs
from export.profiling.protocol import Effort, profile
from toolchain.provenance import machine, revision
from toolchain.significance import differ_significantly, signed_rank

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- measuring: begin -->", "<!-- measuring: end -->"
MAX_FALSE = 2  # significantly different pairs, out of 20 of the same model
MIN_FOUND = 18  # significantly different pairs, out of 20 with one side a tenth slower
MAX_DISAGREEMENT = 0.05  # of our median with benchmark_app's, as a fraction
SLOWED_BY = 0.10
PROCESSES, SECONDS = 24, 6  # for each measurement
HARNESS_MODEL, HARNESS_ROUNDS, HARNESS_S = "vit_t_16", 5, 2  # the cost of a Python call is far below 1 % of a query


class Seen(NamedTuple):
    """The results of the four checks."""

    false: int
    slowed: int
    pairs: int
    dropped: int
    hogs: int
    disagreement: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart/exported/teacher-onnxruntime-fp32"))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--hogs", type=int, default=10)
    parser.add_argument("--docs", type=Path, help="a file whose table to replace")
    arguments = parser.parse_args()
    p50_ms = statistics.median(measure_pair(arguments.model, 0.0)[0])  # also the warm-up
    false = count_different(arguments.model, 0.0, arguments.pairs, "the same")
    slowed = count_different(arguments.model, SLOWED_BY * p50_ms, arguments.pairs, "one a tenth slower")
    dropped = count_grade_c_beside_hogs(arguments.model, arguments.hogs)
    disagreement = compare_with_benchmark_app()
    seen = Seen(false, slowed, arguments.pairs, dropped, arguments.hogs, disagreement)
    lines = make_table(seen)
    print("\n".join(["", *lines]))
    if arguments.docs:
        write(arguments.docs, "\n".join(lines), arguments.model.name, p50_ms)
    scale = arguments.pairs / 20
    finish(
        "measuring",
        [
            claim("pairs of one model significantly different", false, "pairs", "<=", MAX_FALSE * scale),
            claim("slowed pairs significantly different", slowed, "pairs", ">=", MIN_FOUND * scale),
            claim("profiles graded C beside programs on every core", dropped, "profiles", ">=", arguments.hogs),
            claim("difference of our p50 from benchmark_app's", abs(disagreement), "fraction", "<=", MAX_DISAGREEMENT),
        ],
        p50_ms=p50_ms,
    )


def make_table(seen: Seen) -> list[str]:
    """Return the table of the four checks, as lines of Markdown."""
    return [
        "| check | seen | bound |",
        "|---|---|---|",
        f"| pairs of one model significantly different | {seen.false} of {seen.pairs} | at most {MAX_FALSE} of 20 |",
        f"| slowed pairs significantly different | {seen.slowed} of {seen.pairs} | at least {MIN_FOUND} of 20 |",
        f"| profiles graded C beside programs on every core | {seen.dropped} of {seen.hogs} | all |",
        f"| clipkd's p50 compared with benchmark_app's, {HARNESS_MODEL} | {seen.disagreement:+.1%} "
        f"| within {MAX_DISAGREEMENT:.0%} |",
    ]


def write(docs: Path, table: str, model: str, p50_ms: float) -> None:
    described = machine()
    result = (
        f"{table}\n\n{model}, p50 {p50_ms:.2f} ms, {PROCESSES} processes and {SECONDS:g} s for each measurement; "
        f"{described['cpu']}, {described['cores']} cores, commit `{revision()}`, {time.strftime('%Y-%m-%d')}."
    )
    (ROOT / "benchmarks" / "results" / "measuring.md").write_text(f"# measuring\n\n{result}\n", encoding="utf-8")
    replace_section(docs, BEGIN, END, f"\n{result}\n")


def count_different(model: Path, spin_ms: float, pairs: int, name: str) -> int:
    """Measure so many pairs, the second side slowed by `spin_ms`; count the significantly different ones."""
    found = 0
    for number in range(pairs):
        first, second = measure_pair(model, spin_ms)
        different = differ_significantly(first, second, in_turns=True)
        found += different
        ratio = statistics.median(second) / statistics.median(first)
        print(
            f"{name}, pair {number}: p50 ratio {ratio:.3f}, p {signed_rank(first, second):.4f}, "
            f"significantly different: {different}",
            flush=True,
        )
    return found


def count_grade_c_beside_hogs(model: Path, profiles: int) -> int:
    """Measure so many profiles while other programs keep every core busy; count those graded C."""
    dropped = 0
    for number in range(profiles):
        document = profile_beside_hogs(model)
        dropped += document["grade"] == "C"
        print(f"beside hogs, profile {number}: grade {document['grade']} {document['flags']}", flush=True)
    return dropped


def measure_pair(model: Path, spin_ms: float) -> list[list[float]]:
    """Return the median latency of each process of the two sides, in milliseconds."""
    medians: list[list[float]] = [[], []]
    with tempfile.TemporaryDirectory() as scratch:
        threads = describe_machine()["usable_cores"]
        options = RunnerOptions(SECONDS / PROCESSES, threads)
        staged = write_inputs(model, Path(scratch) / "staged", options)["image"]
        command = staged[: staged.index("--images")]  # the tower alone
        for round_ in range(PROCESSES):
            for side in (0, 1)[:: -1 if round_ % 2 else 1]:
                spin = ["--spin-ms", f"{spin_ms:g}"] if side and spin_ms else []
                medians[side].append(statistics.median(runner_here(model, "image", [*command, *spin])["samples_ms"]))
    return medians


def profile_beside_hogs(model: Path) -> ProfileDocument:
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        return profile(model, Effort(3, 0.6)).document
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def compare_with_benchmark_app() -> float:
    """Return the relative difference of clipkd's p50 from benchmark_app's, the median over interleaved rounds.

    Both measure an image tower in OpenVINO.
    """
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
        raise SystemExit(f"benchmark_app printed no median:\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}")
    return float(median[1]) / (1000 if median[2] == "us" else 1)


if __name__ == "__main__":
    main()
