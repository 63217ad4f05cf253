"""Measure a step in parts: ViT-T/16 at 224 px learns from stored features of a ViT-B/16, on a CPU.

    python benchmarks/accumulation.py [--batch 1024] [--parts 64] [--rounds 3]
    python benchmarks/accumulation.py --estimates

A step of `--batch` samples in `--parts` parts is compared with steps of one part each, as large as a part: the memory
of the first should be that of the second, and its time per image at most 1.45 times as long.  The floor of that ratio
is the second forward pass: with t_f and t_b of a forward and a backward pass, (2 t_f + t_b) / (t_f + t_b), which is
measured too.  Each point runs in a fresh process, interleaved.  Weights are random and images noise.  Time is that of
the processor, on which other programs have little effect.  `--estimates` compares the memory that clipkd estimates
before the first step (memory.py) with what steps of several batches and parts take.

The last line of stdout is one JSON document; exit code 5 when a claim does not hold.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from claims import claim, finish

from toolchain.distillation.features import TeacherFeatures
from toolchain.distillation.forward_pass import Forward
from toolchain.distillation.loader import PreparedBatch
from toolchain.distillation.memory import estimate_step
from toolchain.distillation.training_module import TrainingModule, make_optimizer
from toolchain.distributed import ALONE
from toolchain.models.build import build_model
from toolchain.recipe.distill import DistillSpec
from toolchain.recipe.model import ModelSpec
from toolchain.recipe.model_names import resolve_model

TEACHER_WIDTH = 512  # of ViT-B/16
MAX_MEMORY_RATIO, MAX_TIME_RATIO = 1.3, 1.45
ESTIMATED = ((8, 1), (16, 1), (32, 1), (32, 2), (64, 4))
"""Batches and parts whose memory is compared with the estimate."""

MIN_ESTIMATE, MAX_ESTIMATE = 0.9, 1.5
"""Estimated over real memory.  An estimate that is too low ends in a training that the system kills; steps that take at
most 90 % of the free memory are allowed, which is why 0.9 is enough."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--parts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--estimates", action="store_true", help="compare estimated with real memory")
    parser.add_argument("--measure", action="store_true", help="measure one step in this process, and print it")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.batch, arguments.parts)))
        return
    if arguments.estimates:
        compare_estimates()
        return
    size = arguments.batch // arguments.parts
    found: dict[str, list[dict[str, float]]] = {"in parts": [], "one part": []}
    for _ in range(arguments.rounds):
        for name, batch, parts in (("in parts", arguments.batch, arguments.parts), ("one part", size, 1)):
            found[name].append(measure_apart(batch, parts))
    median = {
        name: {key: statistics.median(one[key] for one in ones) for key in ones[0]} for name, ones in found.items()
    }
    whole, part = median["in parts"], median["one part"]
    floor = 1 + part["forward_s"] / part["step_s"]
    memory_ratio, time_ratio = whole["peak_mb"] / part["peak_mb"], whole["s_per_image"] / part["s_per_image"]
    claims = [
        claim("peak memory of a step in parts over that of one part", memory_ratio, "x", "<=", MAX_MEMORY_RATIO),
        claim("time per image of a step in parts over that of one part", time_ratio, "x", "<=", MAX_TIME_RATIO),
    ]
    finish("accumulation", claims, medians=median, floor_of_the_time=round(floor, 3), parts=arguments.parts)


def compare_estimates() -> None:
    """Print real and estimated memory of steps, and claim that the estimates are near."""
    points = [{"batch": batch, "parts": parts} | measure_apart(batch, parts) for batch, parts in ESTIMATED]
    ratios = [point["estimated_mb"] / point["extra_mb"] for point in points]
    claims = [
        claim("lowest estimated memory over real memory", min(ratios), "x", ">=", MIN_ESTIMATE),
        claim("highest estimated memory over real memory", max(ratios), "x", "<=", MAX_ESTIMATE),
    ]
    finish("estimates", claims, points=points)


def measure_apart(batch: int, parts: int) -> dict[str, float]:
    """Return what a fresh process measures."""
    command = [sys.executable, __file__, "--measure", "--batch", str(batch), "--parts", str(parts)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{batch} in {parts}: {found}", file=sys.stderr)
    return found


def measure(batch_size: int, parts: int) -> dict[str, float]:
    """Return peak and estimated memory in MB of 2^20 bytes, and processor time in seconds, of a step after a first one.

    The first one, of one part, allocates the optimizer's state.
    """
    torch.manual_seed(0)
    student = build_model(resolve_model(ModelSpec(model="vit_t_16", init="random"), Path(), "student"), seed=0)
    spec = DistillSpec(steps=9, batch_size=batch_size, lr=1e-4, warmup=0, accumulate=parts)
    trained = TrainingModule(student, SimpleNamespace(embed_dim=TEACHER_WIDTH), spec, ALONE).train()  # type: ignore[arg-type]
    forward, optimizer = Forward(trained, trained, spec, ALONE, 0), make_optimizer(trained, spec)
    pixels = torch.randint(256, (batch_size, 3, student.image_size, student.image_size), dtype=torch.uint8)
    ids = student.tokenize([f"a photo of thing number {number}" for number in range(batch_size)])
    unit = [torch.nn.functional.normalize(torch.randn(batch_size, TEACHER_WIDTH), dim=-1) for _ in range(2)]
    teacher = TeacherFeatures(*unit, torch.tensor(50.0))
    batch = PreparedBatch(pixels, ids, None, None, [""] * batch_size, np.arange(batch_size), 0)
    needed = estimate_step(forward, optimizer, batch_size, TEACHER_WIDTH).of_part(batch_size // parts)
    before_mb = resident_mb()
    first = Forward(trained, trained, spec.model_copy(update={"accumulate": 1}), ALONE, 0)
    size = batch_size // parts
    one_part = batch.split(parts)[0], TeacherFeatures(*(x[:size] for x in unit), teacher.logit_scale)
    take_step(first, optimizer, *one_part, 0)
    repeats = 3 if parts == 1 else 1
    times = [take_step(forward, optimizer, batch, teacher, 1 + step) for step in range(repeats)]
    forward_s, step_s = (statistics.mean(column) for column in zip(*times, strict=True))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "peak_mb": peak_mb,
        "extra_mb": peak_mb - before_mb,
        "estimated_mb": needed / 2**20,
        "forward_s": forward_s,
        "step_s": step_s,
        "s_per_image": step_s / batch_size,
    }


def take_step(
    forward: Forward,
    optimizer: torch.optim.Optimizer,
    batch: PreparedBatch,
    teacher: TeacherFeatures,
    step: int,
) -> tuple[float, float]:
    """Train one step; return the processor time of its first forward pass and of all of it, in seconds."""
    started = time.process_time()
    done = forward.run(batch, teacher, step)
    forward_s = time.process_time() - started
    optimizer.zero_grad(set_to_none=True)
    forward.backward(done, batch, step)
    optimizer.step()
    return forward_s, time.process_time() - started


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()
