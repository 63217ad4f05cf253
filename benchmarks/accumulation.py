"""Measure a step in parts: ViT-T/16 at 224 px learns from stored features of a ViT-B/16, on a CPU.

    python benchmarks/accumulation.py [--batch 1024] [--parts 64] [--rounds 3]

A step of `--batch` samples in `--parts` parts is compared with steps of one part each, as large as a part: the memory
of the first should be that of the second, and its time per image at most 1.45 times as long.  The floor of that ratio
is the second forward pass: with t_f and t_b of a forward and a backward pass, (2 t_f + t_b) / (t_f + t_b), which is
measured too.  Each point runs in a fresh process, interleaved.  Weights are random and images noise.

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
from toolchain.distillation.training_module import TrainingModule, make_optimizer
from toolchain.distributed import ALONE
from toolchain.models.build import build_model
from toolchain.recipe.distill import DistillSpec
from toolchain.recipe.model import ModelSpec
from toolchain.recipe.model_names import resolve_model

TEACHER_WIDTH = 512  # of ViT-B/16
MAX_MEMORY_RATIO, MAX_TIME_RATIO = 1.3, 1.45


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--parts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help="measure one step in this process, and print it")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.batch, arguments.parts)))
        return
    size = arguments.batch // arguments.parts
    found: dict[str, list[dict[str, float]]] = {"in parts": [], "one part": []}
    for _ in range(arguments.rounds):
        for name, batch, parts in (("in parts", arguments.batch, arguments.parts), ("one part", size, 1)):
            command = [sys.executable, __file__, "--measure", "--batch", str(batch), "--parts", str(parts)]
            one = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"{name}: {one}", file=sys.stderr)
            found[name].append(one)
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


def measure(batch_size: int, parts: int) -> dict[str, float]:
    """Return peak memory in MB of 2^20 bytes, and times in seconds, of a step after a first one."""
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
    repeats = max(2, 64 // batch_size + 1) if parts == 1 else 1  # steps of one part are short
    forward_s = step_s = 0.0
    for step in range(1 + repeats):  # the first step allocates the optimizer's state
        if step == 1 or parts > 1:
            forward_s = step_s = 0.0
        started = time.perf_counter()
        done = forward.run(batch, teacher, step)
        forward_s += time.perf_counter() - started
        optimizer.zero_grad(set_to_none=True)
        forward.backward(done, batch, step)
        optimizer.step()
        step_s += time.perf_counter() - started
    count = 1 if parts > 1 else repeats
    return {
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "forward_s": forward_s / count,
        "step_s": step_s / count,
        "s_per_image": step_s / count / batch_size,
    }


if __name__ == "__main__":
    main()
