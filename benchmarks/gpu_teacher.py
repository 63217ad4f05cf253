"""Last step of benchmarks/gpu.py: train the glyphs teacher that clipkd ships with up to ten times the steps.

The number of steps is what fits the time that is left, from the rate of a short training.  The candidate is written to
the folder of results, as float16 weights (benchmarks/ship_teacher.py puts such a file into recipes/), with its log.
"""

import json
import os
import shutil
import time
from pathlib import Path

from gpu_clipkd import call_clipkd
from gpu_results import Step
from safetensors.torch import load_file, save_file
from ship_teacher import WEIGHTS, halve

TIMES = 10
MAX_BYTES = 16 << 20
_RESERVE_S = 45.0  # to evaluate, to write, and for what a long training does not do as fast as a short one
_SHARE = 0.8  # of the time that is left


def main(step: Step) -> None:
    recipe_steps, batch = read_recipe()
    few = 2 if step.dry else 150
    started = time.monotonic()
    probe = train(step, "probe", few, min(2, few - 1))
    whole_s = time.monotonic() - started
    rates = sorted(json.loads(line)["images_per_s"] for line in find_log(probe).read_text().splitlines()[few // 2 :])
    step_s = choose_batch(step, batch) / rates[len(rates) // 2]
    start_s = max(0.0, whole_s - few * step_s)
    affordable = int(_SHARE * (step.left_s() - _RESERVE_S - start_s) / step_s)
    steps = 3 if step.dry else min(TIMES * recipe_steps, affordable)
    step.record("rate", batch=choose_batch(step, batch), images_per_s=rates[len(rates) // 2], steps_that_fit=affordable)
    if steps < recipe_steps and not step.dry:
        step.note(f"not trained: {affordable:,} steps fit, fewer than the recipe's {recipe_steps:,}")
        return
    run = train(step, "candidate", steps, 1 if step.dry else max(200, steps // 20))
    student = run / "student"
    file = step.out / "glyphs_teacher.safetensors"
    save_file(halve(load_file(student / WEIGHTS)), file)
    shutil.copyfile(find_log(run), step.out / "glyphs_teacher.jsonl")
    size, holds = file.stat().st_size, file.stat().st_size <= MAX_BYTES
    last = json.loads(find_log(run).read_text(encoding="utf-8").splitlines()[-1])
    step.record("candidate", steps=steps, recipe_steps=recipe_steps, loss=last["loss"], size_mb=size / 1e6,
                holds=holds)  # fmt: skip
    tiny = ("--set", "evaluate.headline=novel", "--set", "evaluate.sets=[novel]") if step.dry else ()
    shipped = Path(__file__).parents[1] / "recipes" / "glyphs_teacher"
    document = call_clipkd("evaluate", student, shipped, "--recipe", "glyphs_teacher", *tiny, "--json")
    for name, model in zip(("candidate", "shipped"), document["models"], strict=True):
        for eval_set, found in model["sets"].items():
            row = {key: found[key] for key in ("top1", "top1_low", "top1_high", "n")}
            step.record("zero-shot accuracy", teacher=name, set=eval_set, **row)


def read_recipe() -> tuple[int, int]:
    """Return the steps and the batch of the recipe that made the shipped teacher."""
    from toolchain.recipe.load import load_recipe, recipe_path

    spec = load_recipe(recipe_path("glyphs_teacher")).distill
    assert spec is not None
    assert spec.steps is not None
    return spec.steps, spec.batch_size


def choose_batch(step: Step, batch: int) -> int:
    return 16 if step.dry else batch


def train(step: Step, name: str, steps: int, warmup: int) -> Path:
    """Train the recipe's teacher; return the run."""
    run = step.scratch / f"teacher-{name}"
    sets = [f"distill.steps={steps}", f"distill.warmup={warmup}", *(["distill.batch_size=16"] if step.dry else [])]
    workers = 1 if step.dry else max(1, len(os.sched_getaffinity(0)) - 1)  # a GPU is faster than one that draws
    changes = [word for setting in sets for word in ("--set", setting)]
    call_clipkd("distill", "glyphs_teacher", "--out", run, "--workers", str(workers), *changes, "--json")
    return run


def find_log(run: Path) -> Path:
    return run / "student" / "train.jsonl"
