"""Write the figures of docs/scaling.md that are not about losses: start-up, teacher caches, memory of a GPU.

    python benchmarks/scaling.py [--shards 40000] [--tables]

- Start-up, measured: as many names of one small tar archive as there are shards; the stage key is computed and the data
  opened in fresh processes, first without an index, then with one.  Seconds are of the wall clock; core seconds, of all
  processes together, are what another machine's cores divide.
- Teacher caches, computed: bytes and files, from `cache_bytes`, by which `clipkd cache` also refuses a small disk.
- Memory of a GPU, computed: `estimate_step`, by which training chooses `accumulate: auto`, for a student ViT-T/16.

`--tables` writes the tables from the stored measurement (benchmarks/results/scaling.json) without measuring again.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

from claims import claim, finish
from pages import replace_section

from toolchain.provenance import machine, revision

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "scaling.json", ROOT / "docs" / "scaling.md"
MAX_SECOND_START_S = 60.0
SAMPLES_PER_SHARD = 8
PAIRS = {"CC12M, 9.97 M pairs": 9.97e6, "400 M pairs": 400e6}
RECIPE = "paper/vit_t_16_from_vit_b_16"
RANKS, BATCHES = (1, 8, 64), (1024, 8192, 65536)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=40_000)
    parser.add_argument("--tables", action="store_true", help="write the tables from the stored measurement")
    parser.add_argument("--start", type=Path, help="open the shards of this folder in this process, and print seconds")
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(arguments.start, arguments.shards)))
        return
    if not arguments.tables:
        RESULTS.write_text(json.dumps(measure(arguments.shards), indent=1) + "\n", encoding="utf-8")
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    for name, lines in make_tables(document).items():
        replace_section(PAGE, *marks(name), "\n".join(lines))
    second = document["starts"][-1]["second"]["seconds"]
    claims = [claim("second start", second, "s", "<=", MAX_SECOND_START_S)]
    finish("scaling", claims, starts=document["starts"])


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: written by benchmarks/scaling.py -->", f"<!-- end of {name} -->"


def make_tables(document: dict[str, Any]) -> dict[str, list[str]]:
    """Return the lines of each table of the page, by its name there."""
    return {"start-up": start_table(document), "teacher caches": cache_table(), "memory of a GPU": memory_table()}


# Start-up


def measure(shards: int) -> dict[str, Any]:
    """Return the seconds of a first and a second start, for a quarter of the shards and for all."""
    starts = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "shards"
        folder.mkdir()
        content = make_tar(Path(scratch) / "one.tar")
        for number in range(shards):
            if number % 1000 == 0:  # file systems limit the names of a file
                origin = folder / f"{number:05d}.tar"
                origin.write_bytes(content)
            else:
                os.link(origin, folder / f"{number:05d}.tar")
        for count in (shards // 4, shards):
            cache = Path(scratch) / f"cache-{count}"
            command = [sys.executable, __file__, "--start", str(folder), "--shards", str(count)]
            found = {"shards": count}
            for name in ("first", "second"):
                ended = subprocess.run(
                    command,
                    check=True,
                    capture_output=True,
                    text=True,
                    env={**os.environ, "XDG_CACHE_HOME": str(cache)},
                )
                found[name] = json.loads(ended.stdout)
                print(count, name, found[name], file=sys.stderr)
            starts.append(found)
    cores = len(os.sched_getaffinity(0))
    return {"commit": revision(), "machine": machine(), "usable_cores": cores, "starts": starts}


def make_tar(path: Path) -> bytes:
    """Return an archive of a few samples whose images nobody decodes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for row in range(SAMPLES_PER_SHARD):
            for suffix, content in (("jpg", b"x" * 300), ("txt", b"a caption")):
                info = tarfile.TarInfo(f"{row:04d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, BytesIO(content))
    return path.read_bytes()


def start(folder: Path, count: int) -> dict[str, float]:
    """Compute the key of a recipe's data, and open it; the seconds do not count the import of packages."""
    from toolchain.data.open import fingerprint
    from toolchain.data.webdataset_shards import ShardBatches
    from toolchain.recipe.data import WebdatasetSpec

    spec = WebdatasetSpec(kind="webdataset", shards=(f"{folder}/{{00000..{count - 1:05d}}}.tar",))
    before, began = core_seconds(), time.perf_counter()
    fingerprint(spec)
    data = ShardBatches.open(spec, seed=0, batch_size=64)
    data.list_samples(data.steps_per_epoch // 2)
    seconds, cores = time.perf_counter() - began, core_seconds() - before
    return {"seconds": round(seconds, 2), "core_seconds": round(cores, 2), "samples": data.num_samples}


def core_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in used)


def start_table(document: dict[str, Any]) -> list[str]:
    lines = ["| shards | first start | second start |", "| ---: | ---: | ---: |"]
    for found in document["starts"]:
        cells = [f"{found[name]['seconds']:.1f} s ({found[name]['core_seconds']:.1f} core seconds)" for name in TIMES]
        lines.append(f"| {found['shards']:,} | {' | '.join(cells)} |")
    place = f"{document['machine']['cpu']}, {document['usable_cores']} cores that other work shared"
    where = f"Measured on {place}, commit `{document['commit']}`"
    return [*lines, "", f"{where}; shards of {SAMPLES_PER_SHARD} samples on a local disk."]


TIMES = ("first", "second")


# Teacher caches


def cache_table() -> list[str]:
    from toolchain.distillation.make_teacher_cache import SHARD_SAMPLES, cache_bytes

    widths, views = (512, 768), (1, 4)
    heads = [f"E = {width}, K = {number}" for width in widths for number in views]
    lines = [f"| pairs, files | type | {' | '.join(heads)} |", "| --- | --- |" + " ---: |" * len(heads)]
    for name, pairs in PAIRS.items():
        for dtype in ("float32", "float16", "int8"):
            sizes = [cache_bytes(round(pairs), number, width, dtype) for width in widths for number in views]  # type: ignore[arg-type]
            files = f"{name}, {-(-round(pairs) // SHARD_SAMPLES):,}"
            lines.append(f"| {files} | {dtype} | {' | '.join(map(size, sizes))} |")
    return [*lines, "", "Computed: one caption per image and none twice; E: width of the teacher, K: `data.views`."]


def size(number: float) -> str:
    return f"{number / 1e12:.2f} TB" if number >= 1e12 else f"{number / 1e9:.1f} GB"


# Memory of a GPU


def memory_table() -> list[str]:
    from toolchain.distillation.distill import make_optimizer
    from toolchain.distillation.forward_pass import Forward
    from toolchain.distillation.memory import StepMemory, divisors, estimate_step
    from toolchain.distillation.training_module import TrainingModule
    from toolchain.distributed import ALONE
    from toolchain.models.build import build_model
    from toolchain.recipe.load import load_recipe, recipe_path

    recipe = load_recipe(recipe_path(RECIPE))
    spec = recipe.distill
    assert spec is not None
    student = build_model(recipe.student, seed=0, say=lambda text: None)
    trainee = TrainingModule(student, None, spec.without_teacher(), ALONE)
    optimizer = make_optimizer(trainee, spec)
    parameters = 4 * sum(parameter.numel() for parameter in trainee.parameters())
    lines = ["| batch | " + " | ".join(f"{ranks} GPU{'s' * (ranks > 1)}" for ranks in RANKS) + " |"]
    lines += ["| ---: |" + " ---: |" * len(RANKS)]
    budget = 24e9
    for batch in BATCHES:
        cells = []
        for ranks in RANKS:
            rows = batch // ranks
            now = spec.without_teacher().model_copy(update={"batch_size": batch, "precision": "bf16"})
            step: StepMemory = estimate_step(Forward(trainee, trainee, now, ALONE, 0), optimizer, rows, 512)
            fitting = [parts for parts in divisors(rows) if step.of_part(rows // parts) + parameters <= budget]
            total = step.of_part(rows // fitting[0]) + parameters
            cells.append(f"{fitting[0]}, {total / 1e9:.1f} GB")
        lines.append(f"| {batch:,} | {' | '.join(cells)} |")
    name = RECIPE.partition("_from")[0].removeprefix("paper/")
    note = (
        f"Computed for a student {name} at 224 px in bf16, with a teacher cache of width 512: the smallest "
        f"`accumulate` with which a step takes at most {budget / 1e9:g} GB of a GPU, and what it then takes."
    )
    return [*lines, "", note]


if __name__ == "__main__":
    main()
