"""Measure memory and time of the published objectives against the batch: clipkd's blocks, the definitions, open_clip.

    python benchmarks/loss_memory.py [--batches 2048 4096 8192 16384 32768 65536] [--rounds 3]

Each point runs in a fresh process: unit features of width 512, forward and backward pass.  Memory is what the process
needs beyond its features at its peak.  Time is that of the processor in all threads: other programs hardly change it.
The sides interleave, and the median of the rounds counts for time.

- ours: task, CRD, FD and ICL as training computes them (`weighted_loss`);
- dense: the same four from losses.py, which hold the square of the batch;
- open_clip: its own `DistillClipLoss`, which is the task and CRD without FD and ICL.

Sides that hold the square stop where a machine of 24 GB ends: dense at 8,192, open_clip at 16,384.  What dense would
need at 16,384 is computed, as four times its memory at 8,192.  Points of other batches that an earlier call measured on
such a machine stay.  The results are written to
benchmarks/results/loss_memory.json, the curves to docs/loss_memory.png and the table into docs/scaling.md.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from claims import claim, finish
from pages import replace_section
from torch import Tensor

from toolchain.distillation.features import BatchFeatures, Scales, StudentFeatures, TeacherFeatures
from toolchain.distillation.losses import clip_loss, crd_loss, fd_loss, icl_loss
from toolchain.distillation.objectives import weighted_loss
from toolchain.provenance import machine, revision

ROOT = Path(__file__).parents[1]
RESULTS, CHART, PAGE = (
    ROOT / name for name in ("benchmarks/results/loss_memory.json", "docs/loss_memory.png", "docs/scaling.md")
)
WIDTH = 512
LARGEST = {"dense": 8192, "open_clip": 16384}
SIDES = ("ours", "dense", "open_clip")
MIN_MEMORY_RATIO, MAX_EXTRA_MB, MIN_SPEEDUP = 40.0, 1024.0, 2.0
"""At 16,384; at 32,768 and 65,536; at 8,192 on a CPU."""

TABLE = ("<!-- table of benchmarks/loss_memory.py -->", "<!-- end of the table -->")
COLORS = {"ours": "#0b6e4f", "dense": "#b3261e", "open_clip": "#5f6368"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[2**k for k in range(11, 17)])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="measure one point in this process, and print it")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.batches[0])))
        return
    commit = revision()
    points = [point for point in read_points() if point["batch"] not in arguments.batches]
    for batch in arguments.batches:
        sides = [side for side in SIDES if batch <= LARGEST.get(side, batch)]
        rounds = arguments.rounds if batch <= 8192 else 1  # a minute each, and memory does not vary
        found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side in sides:
                found[side].append(measure_apart(side, batch))
                print(f"{batch:6} {side:9} {found[side][-1]}", file=sys.stderr)
        points += [
            {
                "batch": batch,
                "side": side,
                "commit": commit,
                "extra_mb": round(max(one["extra_mb"] for one in ones), 1),
                "seconds": round(statistics.median(one["seconds"] for one in ones), 3),
            }
            for side, ones in found.items()
        ]
    document = {"machine": machine(), "width": WIDTH, "points": points}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    draw(points)
    write_table(document)
    finish("loss_memory", check(points), points=points)


def read_points() -> list[dict[str, Any]]:
    """Return the stored points, or none if they are of another kind of machine."""
    document = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    points: list[dict[str, Any]] = document["points"] if document.get("machine") == machine() else []
    return points


def measure_apart(side: str, batch: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--batches", str(batch)]
    waiting = os.environ | {"OMP_WAIT_POLICY": "passive"}  # threads that spin while another program runs would count
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=waiting)
    found: dict[str, float] = json.loads(run.stdout)
    return found


def measure(side: str, batch: int) -> dict[str, float]:
    """Return peak memory beyond the features in MB of 2^20 bytes, and the processor time of both passes in seconds."""
    compute = {"ours": ours, "dense": dense, "open_clip": open_clip_loss}[side]
    differentiate(compute, 64)  # libraries load, and their memory is not counted
    torch.manual_seed(0)
    student, teacher = make_features(batch)
    before = peak_mb()
    started = time.process_time()
    compute(student, teacher).backward()  # type: ignore[no-untyped-call]
    return {"extra_mb": peak_mb() - before, "seconds": time.process_time() - started}


def differentiate(compute: Callable[[list[Tensor], list[Tensor]], Tensor], batch: int) -> None:
    compute(*make_features(batch)).backward()  # type: ignore[no-untyped-call]


def make_features(batch: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return image and text features and the scale, of the student and of the teacher."""
    found = []
    for wants_gradient in (True, False):
        features = [torch.randn(batch, WIDTH) for _ in range(2)]
        for x in features:  # in place: normalizing would hold a second copy, and hide as much of the peak
            x /= x.norm(dim=1, keepdim=True)
        found.append([x.requires_grad_(wants_gradient) for x in (*features, torch.tensor(14.3))])
    return found[0], found[1]


def ours(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    image, text, scale = student
    batch = BatchFeatures(StudentFeatures(image, text, image, text), TeacherFeatures(*teacher))
    cross = torch.tensor(14.3, requires_grad=True)
    return weighted_loss(batch, batch, Scales(scale, cross), {"task": 1.0, "crd": 1.0, "fd": 3.9, "icl": 1.0})[0]


def dense(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    cross = torch.tensor(14.3, requires_grad=True)
    loss = clip_loss(*student) + crd_loss(*student, *teacher) + 3.9 * fd_loss(*student[:2], *teacher[:2])
    return loss + icl_loss(*student[:2], *teacher[:2], cross)


def open_clip_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    from open_clip.loss import DistillClipLoss

    contrastive, distilled = DistillClipLoss()(*student, *teacher)
    total: Tensor = contrastive + distilled
    return total


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def find(points: list[dict[str, Any]], side: str, batch: int) -> dict[str, Any] | None:
    return next((point for point in points if (point["side"], point["batch"]) == (side, batch)), None)


def check(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the claims for the batches that were measured."""
    claims = []
    for point in points:
        other = find(points, "dense", point["batch"])
        if point["side"] != "ours":
            continue
        half = find(points, "dense", 8192)
        if point["batch"] == 16384 and half:
            ratio = 4 * half["extra_mb"] / point["extra_mb"]
            claims.append(claim("computed memory of dense over ours at 16,384", ratio, "x", ">=", MIN_MEMORY_RATIO))
        if point["batch"] >= 32768:
            claims.append(claim(f"our memory at {point['batch']:,}", point["extra_mb"], "MB", "<=", MAX_EXTRA_MB))
        if point["batch"] == 8192 and other:
            ratio = other["seconds"] / point["seconds"]
            claims.append(claim("time of dense over ours at 8,192", ratio, "x", ">=", MIN_SPEEDUP))
    return claims


def write_table(document: dict[str, Any]) -> None:
    points, place = document["points"], document["machine"]
    lines = ["| batch | ours | dense | open_clip (task and CRD only) |", "| ---: | ---: | ---: | ---: |"]
    for batch in sorted({point["batch"] for point in points}):
        cells = []
        for side in SIDES:
            point = find(points, side, batch)
            cells.append("" if point is None else f"{point['extra_mb']:,.0f} MB, {point['seconds']:.1f} s")
        lines.append(f"| {batch:,} | {' | '.join(cells)} |")
    commits = dict.fromkeys(f"`{point['commit']}`" for point in points)
    where = f"{place['cpu']}, {place['cores']} cores, commit {', '.join(commits)}"
    lines += [
        "",
        f"Measured on {where}: memory beyond the features, of width {WIDTH}, and processor time of both passes.",
    ]
    lines += ["", f"![Memory and time against the batch]({CHART.name})"]
    replace_section(PAGE, *TABLE, "\n".join(lines))


def draw(points: list[dict[str, Any]]) -> None:
    """Draw memory and time against the batch, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = {"extra_mb": "peak memory beyond the features (MB)", "seconds": "processor time of both passes (s)"}
    for axes, (field, label) in zip(panels, labels.items(), strict=True):
        for side in SIDES:
            own = sorted((point["batch"], point[field]) for point in points if point["side"] == side)
            axes.plot(*zip(*own, strict=True), "o-", color=COLORS[side], label=side, markersize=4)
        axes.set(xscale="log", yscale="log", xlabel="batch", ylabel=label)
        axes.set_xticks([point["batch"] for point in points if point["side"] == "ours"])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(CHART, dpi=110)


if __name__ == "__main__":
    main()
