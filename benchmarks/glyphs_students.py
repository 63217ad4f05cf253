"""Train students on glyphs, score them and put their table into a page: what the benchmarks of methods share.

A student that is trained leaves result.json in its folder, and the teacher's features leave `complete` in theirs: an
interrupted benchmark continues with the same command.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pages import replace_section

if TYPE_CHECKING:
    from toolchain.data.batch import TrainingData
    from toolchain.distillation.distill import Training
    from toolchain.distillation.teacher_cache import TeacherCache
    from toolchain.models.clip_model import ClipModel
    from toolchain.recipe.model import ModelSpec

ROOT = Path(__file__).resolve().parent.parent
SETS: tuple[Literal["stix", "serif", "novel"], ...] = ("stix", "serif", "novel")
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447}  # degrees of freedom: two-sided quantile of t
_RESULT, _COMPLETE = "result.json", "complete"


def train_and_score(folder: Path, make: Callable[[], "Training"], *, threads: int = 1) -> dict[str, Any]:
    """Train the student that `make` returns and score it, or read the result that an earlier call wrote."""
    result = folder / _RESULT
    if not result.exists():
        import torch

        torch.set_num_threads(threads)
        from toolchain.distillation.distill import distill

        folder.mkdir(parents=True, exist_ok=True)
        training = make()
        trained = distill(training, folder, quiet)
        _write_json(result, score(training.student) | {"train_s": trained["train_s"]})
    return _read_json(result)


def train_two_at_a_time(
    train: Callable[..., dict[str, Any]], jobs: Sequence[tuple[Any, ...]]
) -> Iterator[dict[str, Any]]:
    """Yield the result of `train(*job)` for each job, as they finish, and print the `label` of each with its top-1."""
    started = time.monotonic()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(train, *job) for job in jobs]
        for number, done in enumerate(as_completed(waiting), 1):
            result = done.result()
            minutes = (time.monotonic() - started) / 60
            print(
                f"{number}/{len(jobs)} after {minutes:.1f} min: {result['label']}: {100 * result['pooled']:.2f} % "
                f"in {result['train_s']:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            yield result


def store_features(
    teacher: "ModelSpec", data: "TrainingData", folder: Path, *, seed: int, steps: int
) -> "TeacherCache":
    """Return a teacher's features of the data's views; every student reads them, so they are computed once."""
    from toolchain.distillation.make_teacher_cache import SHARD_SAMPLES, CachePlan, make_cache
    from toolchain.distillation.teacher import live_teacher
    from toolchain.distillation.teacher_cache import open_cache
    from toolchain.distributed import ALONE
    from toolchain.models.build import build_model
    from toolchain.recipe.model_names import fingerprint

    views = data.num_views
    assert views is not None
    depends = {"teacher": fingerprint(teacher), "seed": seed, "views": views}
    depends |= {"dtype": "float32", "shard_samples": SHARD_SAMPLES}
    if not (folder / _COMPLETE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        live = live_teacher(build_model(teacher, seed=0), "fp32", ALONE.device)
        make_cache(live, data, folder, CachePlan(depends, "float32", num_views=views, steps=steps), quiet)
        (folder / _COMPLETE).touch()
    return open_cache(folder, depends)


def score(model: "ClipModel") -> dict[str, Any]:
    """Return top-1 and number of images of each set, and top-1 over all images."""
    from toolchain.distributed import ALONE
    from toolchain.evaluation.open_sets import open_set
    from toolchain.evaluation.torch_encoders import headline_accuracy

    found = {}
    for name in SETS:
        accuracy = headline_accuracy(open_set(name))(model, ALONE)
        found[name] = {"top1": accuracy["top1"], "n": accuracy["n"]}
    hits = sum(part["top1"] * part["n"] for part in found.values())
    return {"pooled": hits / sum(part["n"] for part in found.values()), "sets": found}


def score_teacher(teacher: "ModelSpec", path: Path) -> dict[str, Any]:
    """Return the scores of a model that has weights; they are stored in `path`."""
    if not path.exists():
        from toolchain.models.build import build_model

        path.parent.mkdir(parents=True, exist_ok=True)
        _write_json(path, score(build_model(teacher, seed=0)))
    return _read_json(path)


def quiet(what: str, done: int, total: int, note: str = "") -> None:
    pass


# Numbers and text -----------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval, by Student's t."""
    half = T_95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), half


def mean_and_spread(values: Sequence[float]) -> str:
    """Return the mean and the standard deviation of fractions, in per cent."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{100 * statistics.fmean(values):.2f} ± {100 * spread:.2f}"


def means_by_set(results: Sequence[dict[str, Any]]) -> str:
    """Return the mean top-1 of each set, in per cent."""
    return " / ".join(f"{100 * statistics.fmean(each['sets'][name]['top1'] for each in results):.1f}" for name in SETS)


def write_result(script: str, marks: tuple[str, str], table: str, settings: str, claims: list[dict[str, Any]]) -> None:
    """Put a table between the two comments in docs/method.md, and with the claims into benchmarks/results/."""
    from toolchain.provenance import machine, revision

    described = machine()
    where = f"{described['cpu']}, {described['cores']} cores, commit `{revision()}`, {time.strftime('%Y-%m-%d')}"
    result = f"{table}\n\n{settings}; {where}."
    listed = "".join(f"- {item['claim']}: {item['value']} (bound {item['bound']})\n" for item in claims)
    stored = "\n\n".join([f"# {script}", result, *([listed.rstrip()] if claims else [])])
    (ROOT / "benchmarks" / "results" / f"{script}.md").write_text(f"{stored}\n", encoding="utf-8")
    replace_section(ROOT / "docs" / "method.md", *marks, f"\n{result}\n")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
