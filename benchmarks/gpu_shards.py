"""Step 4 of benchmarks/gpu.py: train from tar shards, end to end: images/s, and the share of time the GPU waits.

The shards hold JPEGs of 256 px, made on the spot as in benchmarks/data.py, and lie on the machine's disk; after the
first pass they are in its page cache.  The trainings are `clipkd distill` itself: ViT-B/16 teaches ViT-T/16 in bf16,
live and from a cache.  The first row is the loader alone, with nothing to wait for.
"""

import json
import multiprocessing
import os
import statistics
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from data import make_jpeg, write_shards
from gpu_clipkd import call_clipkd
from gpu_results import Step

from toolchain.data.webdataset_shards import ShardBatches
from toolchain.distillation.loader import load_batches
from toolchain.models.build import build_model
from toolchain.recipe.data import WebdatasetSpec
from toolchain.recipe.model import ModelSpec

SIZE_PX = 256
SMALL: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": {"width": 32, "heads": 2, "layers": 2},
}


def main(step: Step) -> None:
    os.environ["XDG_CACHE_HOME"] = str(step.scratch / "cache")  # for the index of the shards
    distinct, count, batch, steps = (8, 32, 4, 4) if step.dry else (512, 16384, 1024, 48)
    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    started = time.monotonic()
    with multiprocessing.get_context("fork").Pool(workers) as pool:  # before this process uses the GPU
        jpegs = pool.map(partial(make_jpeg, SIZE_PX), range(distinct))
    folder = step.scratch / "shards"
    write_shards(folder, [jpegs[number % distinct] for number in range(count)])
    size_kb = statistics.fmean(map(len, jpegs)) / 1e3
    step.note(f"{count:,} JPEGs of {SIZE_PX} px, {size_kb:.0f} kB each, made in {time.monotonic() - started:.0f} s")
    shards = str(folder / "{00000..00003}.tar")
    measure_loader(step, shards, batch, steps, workers)
    for name, cached in (("live teacher", False), ("cached teacher", True)):
        recipe = write_recipe(step, shards, batch, steps, cached)
        began = time.monotonic()
        call_clipkd("distill", recipe, "--out", step.scratch / recipe.stem, "--json")
        record_training(step, name, step.scratch / recipe.stem / "student", batch, steps)
        step.note(f"{name}: the whole command took {time.monotonic() - began:.0f} s")


def measure_loader(step: Step, shards: str, batch: int, steps: int, workers: int) -> None:
    """Record the rate of the loader processes alone, after the first batches."""
    data = ShardBatches.open(WebdatasetSpec(kind="webdataset", shards=(shards,)), seed=0, batch_size=batch)
    student = build_model(student_spec(step), seed=0)
    skipped = min(2 * workers, steps // 2)  # what lies ready when the first batch is there
    with closing(load_batches(data, range(steps), slice(None), student, None, workers)) as loaded:
        for _ in range(skipped):
            next(loaded)
        started = time.monotonic()
        images = sum(len(each.student_ids) for each in loaded)
    seconds = time.monotonic() - started
    step.record("from shards", case="loader alone", batch=batch, workers=workers, images_per_s=images / seconds)


def student_spec(step: Step) -> ModelSpec:
    return ModelSpec(model="ViT-B-16", model_cfg=SMALL) if step.dry else ModelSpec(model="vit_t_16")


def write_recipe(step: Step, shards: str, batch: int, steps: int, cached: bool) -> Path:
    changes = {"model_cfg": SMALL} if step.dry else {}
    recipe = {
        "name": "shards-cached" if cached else "shards-live",
        "data": {"kind": "webdataset", "shards": [shards], **({"views": 1} if cached else {})},
        "teacher": {"model": "ViT-B-16", "init": "random", **changes},
        "student": student_spec(step).model_dump(exclude_defaults=True),
        "distill": {
            "steps": steps,
            "batch_size": batch,
            "lr": 1e-4,
            "warmup": 2,
            "precision": "bf16",
            "teacher_precision": "bf16",
            **({"teacher_cache": {"dtype": "float16"}} if cached else {}),
        },
        "export": {"precisions": ["fp32"]},
    }
    path = step.scratch / f"{recipe['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def record_training(step: Step, name: str, folder: Path, batch: int, steps: int) -> None:
    """Record the rates of a finished training from its log, without the first quarter of its steps."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["summary"]
    settled = [row for row in rows if row["step"] >= steps // 4]

    def mean(column: str) -> float | None:
        found = [row[column] for row in settled if row.get(column) is not None]
        return statistics.fmean(found) if found else None

    rates = [row["images_per_s"] for row in settled if row.get("images_per_s")]
    step.record(
        "from shards",
        case=name,
        batch=batch,
        device=summary["device"],
        images_per_s=len(rates) / sum(1 / rate for rate in rates) if rates else None,
        waiting=mean("data_fraction"),
        teacher_share=mean("teacher_fraction"),
        training_s=summary["train_s"] - summary.get("teacher_s", 0.0),
        caching_s=summary.get("teacher_s"),
    )
