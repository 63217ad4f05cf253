"""The stages up to the checkpoints: the frozen teacher, the baseline, the student, and the int8 student.

Heavy packages are imported inside the work, so that a run whose stages are all complete needs none of them.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import UsageError
from toolchain.recipe import DataSpec, EvaluateSpec, LossWeights, ModelSpec, Recipe
from toolchain.stages import Screen, Stage


@dataclass(frozen=True)
class How:
    """What of training the command line decides, and no number of the result depends on."""

    workers: int | None = None
    checkpoint_steps: int | None = None
    checkpoint_minutes: float = 1.0
    keep_checkpoints: int = 2

    @property
    def size(self) -> int:
        """How many processes torchrun started."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def leads(self) -> bool:
        """Whether this is the first of them, the one that writes and speaks."""
        return os.environ.get("RANK", "0") == "0"


def train(recipe: Recipe, out: Path, screen: Screen, how: How) -> dict[str, Stage]:
    """The frozen teacher, the student it teaches, and if asked for the same student, seed and batches without it.

    Where the recipe trains nothing: the model it adopts.
    """
    if recipe.distill is None:
        return {"adopted": _adopt(recipe, recipe.student, out, "adopted", screen, how)}

    if not (out / "student").exists():
        _refuse_misfits(recipe, screen)
    if recipe.teacher is None:
        return {"student": _train_one(recipe, out, "student", None, screen, how)}
    teacher = _teacher(recipe, out, screen, how)
    made = {"teacher": teacher}
    if recipe.baseline:
        made["baseline"] = _train_one(recipe, out, "baseline", None, screen, how)
    return made | {"student": _train_one(recipe, out, "student", teacher, screen, how)}


def _refuse_misfits(recipe: Recipe, screen: Screen) -> None:
    """Say that models cannot be trained together before anything is read, downloaded or trained for them."""
    from toolchain.models import build_model, check_pair
    from toolchain.recipe import teacher_recipe

    without_weights = {"pretrained": None, "checkpoint": None, "init": "random"}
    student = build_model(recipe.student.model_copy(update=without_weights), seed=0, say=screen.say)
    teacher = None
    if recipe.teacher is not None:
        spec = teacher_recipe(recipe.teacher).student if recipe.teacher.recipe else recipe.teacher
        teacher = build_model(spec.model_copy(update=without_weights), seed=0, say=screen.say)
    assert recipe.distill is not None
    check_pair(student, teacher, recipe.distill.loss_weights)


def _adopt(recipe: Recipe, spec: ModelSpec, out: Path, name: str, screen: Screen, how: How) -> Stage:
    """A model from wherever it comes, as an open_clip local-dir in the run."""
    from toolchain.sources import fingerprint

    def work(folder: Path) -> dict[str, Any]:
        from toolchain.models import build_model, save_model

        if how.leads:
            save_model(build_model(spec, seed=recipe.seed, say=screen.say), folder)
        return {"role": name, "source": spec.model_dump(exclude_defaults=True), "train_s": None}

    screen.starts(name)
    fields = {"seed": recipe.seed} if spec.is_random else {}
    stage = _make_stage(
        how,
        out / name,
        kind="adopt",
        version=2,
        fields=fields,
        fingerprints={"model": fingerprint(spec)},
        inputs={},
        work=work,
    )
    screen.done(name, stage)
    return stage


def _train_one(recipe: Recipe, out: Path, name: str, teacher: Stage | None, screen: Screen, how: How) -> Stage:
    from toolchain.sources import fingerprint

    spec, data_spec = recipe.distill, recipe.data
    assert spec is not None
    assert data_spec is not None
    if teacher is None:  # nothing it reads depends on the weights of losses it does not have
        alone = type(spec.loss_weights)(**dict.fromkeys(spec.loss_weights.model_dump(), 0.0) | {"task": 1.0})
        changes = {"loss_weights": alone, "teacher_cache": None, "teacher_precision": "fp32"}
        spec = spec.model_copy(update=changes | {"reference_compat": False})

    def work(folder: Path) -> dict[str, Any]:
        from toolchain.distil import Engine, distil
        from toolchain.eval_sets import open_set
        from toolchain.feed import training_data
        from toolchain.models import build_model, load_model
        from toolchain.processes import join_processes
        from toolchain.validate import headline_accuracy

        student = build_model(recipe.student, seed=recipe.seed, say=screen.say)
        frozen: Any = None
        caching_s = 0.0
        if teacher and spec.teacher_cache:
            frozen, caching_s = _opened_cache(recipe, out, teacher, screen, how)
            screen.starts(name)
        elif teacher:
            frozen = load_model(teacher.path)
        processes = join_processes()
        with processes.first_alone():  # shards are indexed once
            data = training_data(
                data_spec, seed=recipe.seed, batch_size=spec.batch_size, progress=screen.progress, say=screen.say
            )
        accuracy = None
        if spec.evaluate_every and recipe.evaluate:
            accuracy = headline_accuracy(open_set(recipe.evaluate.headline_set))
        engine = Engine(
            processes,
            _num_workers(data_spec, how, processes.device.type),
            how.checkpoint_steps,
            60 * how.checkpoint_minutes,
            how.keep_checkpoints,
            getattr(data_spec, "max_damaged", 1.0),
            screen.say,
        )
        progress = screen.progress
        trained = distil(
            spec, student, frozen, data, folder, progress, seed=recipe.seed, engine=engine, accuracy=accuracy
        )
        train_s = round(trained["train_s"] + caching_s, 1)  # what the student cost, the teacher's part included
        return {"role": name, "teacher_s": caching_s} | trained | {"train_s": train_s}

    screen.starts(name)
    evaluated = {"headline": recipe.evaluate.headline} if spec.evaluate_every and recipe.evaluate else {}
    stage = _make_stage(
        how,
        out / name,
        kind="distil",
        version=3,
        fields={
            "seed": recipe.seed,
            "data": _data_fields(data_spec),
            "distill": spec.model_dump(exclude={"teacher_cache": {"path", "also"}}),  # they change no feature
        }
        | evaluated,
        fingerprints={"data": _data_fingerprint(data_spec), "student": fingerprint(recipe.student)},
        inputs={"teacher": teacher} if teacher else {},
        work=work,
    )
    screen.done(name, stage)
    return stage


def cache_teachers(recipe: Recipe, out: Path, screen: Screen, how: How) -> dict[str, Stage]:
    """The features of the recipe's teacher, and of those it names beside it: a stage for each."""
    spec = recipe.distill
    if spec is None or spec.teacher_cache is None:
        raise UsageError(
            f"recipe {recipe.name} has no distill.teacher_cache; add one, as in --set distill.teacher_cache={{}}, and "
            "data.views: the number of augmentations of each sample to store"
        )
    if spec.teacher_cache.path is not None:
        raise UsageError("distill.teacher_cache.path names a cache that is made already; remove it to make one")
    made = {"teacher": _teacher(recipe, out, screen, how)}
    for number, further in enumerate(spec.teacher_cache.also, 2):
        name = f"teacher-{number}"
        made[name] = _adopt(recipe, further, out, name, screen, how)
    return {f"teacher-cache/{name}": _cache(recipe, out, name, stage, screen, how) for name, stage in made.items()}


def _teacher(recipe: Recipe, out: Path, screen: Screen, how: How) -> Stage:
    from toolchain.recipe import teacher_recipe

    assert recipe.teacher is not None
    if recipe.teacher.recipe is not None:
        return _train_one(teacher_recipe(recipe.teacher), out, "teacher", None, screen, how)
    return _adopt(recipe, recipe.teacher, out, "teacher", screen, how)


def _cache(recipe: Recipe, out: Path, name: str, teacher: Stage, screen: Screen, how: How) -> Stage:
    """A teacher's features of every view and caption."""
    from toolchain.teacher_cache import refuse_foreign

    spec, data_spec = recipe.distill, recipe.data
    assert spec is not None
    assert spec.teacher_cache is not None
    assert data_spec is not None
    path, dtype = out / "teacher-cache" / name, spec.teacher_cache.dtype
    depends = _cache_depends(recipe, teacher)
    refuse_foreign(path, depends)

    def work(folder: Path) -> dict[str, Any]:
        from toolchain.caching import make_cache
        from toolchain.feed import training_data
        from toolchain.models import load_model
        from toolchain.processes import join_processes
        from toolchain.teacher import live_teacher

        processes = join_processes()
        live = live_teacher(load_model(teacher.path), spec.teacher_precision, processes.device, compiled=spec.compile)
        with processes.first_alone():  # shards are indexed once
            data = training_data(
                data_spec, seed=recipe.seed, batch_size=spec.batch_size, progress=screen.progress, say=screen.say
            )
        steps = spec.steps or (spec.epochs or 0) * data.steps_per_epoch
        return make_cache(
            live,
            data,
            folder,
            depends,
            screen.progress,
            dtype=dtype,
            num_views=depends["views"],
            steps=steps,
            processes=processes,
            say=screen.say,
        )

    screen.starts(f"teacher-cache/{name}")
    stage = _make_stage(
        how, path, kind="teacher-cache", version=1, fields=depends, fingerprints={}, inputs={}, work=work
    )
    screen.done(f"teacher-cache/{name}", stage)
    return stage


def _opened_cache(recipe: Recipe, out: Path, teacher: Stage, screen: Screen, how: How) -> tuple[Any, float]:
    """The cache that a student learns from, made first if it is this run's, and the seconds that making it took."""
    from toolchain.stages import open_stage
    from toolchain.teacher_cache import open_cache

    assert recipe.distill is not None
    assert recipe.distill.teacher_cache is not None
    elsewhere = recipe.distill.teacher_cache.path
    depends = _cache_depends(recipe, teacher)
    if elsewhere is not None:
        cache = open_cache(Path(elsewhere), depends)
        if how.leads:
            open_stage(Path(elsewhere))
        return cache, 0.0
    stage = _cache(recipe, out, "teacher", teacher, screen, how)
    return open_cache(stage.path, depends), float(stage.manifest["took_s"])


def _cache_depends(recipe: Recipe, teacher: Stage) -> dict[str, Any]:
    """What decides the bytes of a teacher's features."""
    from toolchain.caching import SHARD_SAMPLES
    from toolchain.sources import CONFIG, WEIGHTS

    spec, data_spec = recipe.distill, recipe.data
    assert spec is not None
    assert spec.teacher_cache is not None
    assert data_spec is not None
    config = json.loads((teacher.path / CONFIG).read_text(encoding="utf-8"))
    files = dict(teacher.manifest["files"])
    tokenizer = {name: digest for name, digest in files.items() if name.startswith(("tokenizer", "vocab", "merges"))}
    return {
        "teacher": {
            "weights": files[WEIGHTS],
            "architecture": config["model_cfg"],
            "transform": config["preprocess_cfg"],
            "tokenizer": tokenizer,
            "precision": spec.teacher_precision,
        },
        "data": {**_data_fields(data_spec), "fingerprint": _data_fingerprint(data_spec)},
        "seed": recipe.seed,
        "views": data_spec.views,
        "dtype": spec.teacher_cache.dtype,
        "shard_samples": SHARD_SAMPLES,
    }


def _data_fingerprint(spec: DataSpec) -> str:
    """What a stage that reads the training data depends on."""
    if spec.kind == "glyphs":
        from toolchain import glyphs

        return glyphs.fingerprint()
    from toolchain.listings import fingerprint

    return fingerprint(spec)


def _data_fields(spec: DataSpec) -> dict[str, Any]:
    """What of the data section decides what is trained: not when to give up."""
    return spec.model_dump(exclude={"max_damaged": True, "sources": {"__all__": {"max_damaged"}}})


def _num_workers(spec: DataSpec, how: How, device: str) -> int:
    """Unless told: none for glyphs, which cost little to draw; beside a GPU the cores that training leaves free.

    Training on a CPU uses all its cores, and takes far longer for a picture than a loader does: one stays ahead of it.
    """
    if how.workers is not None:
        return how.workers
    if spec.kind == "glyphs":
        return 0
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if device == "cpu" else max(1, usable // how.size - 1)


def _make_stage(how: How, path: Path, *, work: Callable[[Path], dict[str, Any]], **depends: Any) -> Stage:
    """A stage of one process, or of those that torchrun started: the first makes it, the others work along."""
    from toolchain.stages import open_stage, run_stage

    if how.size == 1:
        return run_stage(path, work=work, **depends)
    from toolchain.processes import join_processes

    together = join_processes()
    if together.leads:

        def working(folder: Path) -> dict[str, Any]:
            together.share(str(folder))
            return work(folder)

        stage = run_stage(path, work=working, **depends)
        if stage.cached:
            together.share(None)
        together.wait()
        return stage
    folder = together.share(None)
    if folder is not None:
        work(Path(folder))
    together.wait()
    return open_stage(path)


def quantize(recipe: Recipe, out: Path, made: dict[str, Stage], screen: Screen) -> dict[str, Stage]:
    """The int8 student, calibrated and fine-tuned against the teacher."""
    spec = recipe.quantize
    if spec is None or not recipe.export.is_quantized:
        return {}
    from toolchain.stages import run_stage

    role = "student" if recipe.distill else "adopted"
    name, student, teacher = f"{role}-int8", made[role], made.get("teacher")
    data_spec = recipe.data
    assert data_spec is not None
    weights = recipe.distill.loss_weights if recipe.distill else LossWeights()
    judged: dict[str, str] = {}
    if spec.max_drop is not None and recipe.evaluate is not None:
        from toolchain.eval_sets import fingerprint

        judged["headline"] = fingerprint(recipe.evaluate.headline_set)

    def work(folder: Path) -> dict[str, Any]:
        from toolchain.feed import training_data
        from toolchain.finetune import quantize_student
        from toolchain.models import load_model

        data = training_data(data_spec, seed=recipe.seed, batch_size=spec.batch_size)
        frozen = _cached_or_live(recipe, out, teacher) if teacher else None
        float_student, probe = load_model(student.path), None
        if judged and recipe.evaluate is not None:
            from toolchain.eval_sets import open_set
            from toolchain.sensitivity import headline_probe

            probe = headline_probe(float_student, open_set(recipe.evaluate.headline_set))
        quantized = quantize_student(
            spec, weights, float_student, frozen, data, folder, screen.progress, seed=recipe.seed, headline=probe
        )
        return {"role": role} | quantized

    screen.starts(name)
    stage = run_stage(
        out / name,
        kind="quantize",
        version=6,
        fields={
            "seed": recipe.seed,
            "data": _data_fields(data_spec),
            "quantize": spec.model_dump(),
            "loss_weights": weights.model_dump(),
            "teacher_features": _stored_as(recipe, out) or "float32",  # computed anew, they are nearly the same bits
        }
        | ({"headline": recipe.evaluate.headline} if judged and recipe.evaluate else {}),
        fingerprints={"data": _data_fingerprint(data_spec)} | judged,
        inputs={"student": student} | ({"teacher": teacher} if teacher else {}),
        work=work,
    )
    screen.done(name, stage)
    return {name: stage}


def _cached_or_live(recipe: Recipe, out: Path, teacher: Stage) -> Any:
    """The features that the student learnt from, where they are still there; a few dozen batches pay for no new ones.

    Raises:
        ArtifactError: they belong to something else.
    """
    from toolchain.models import load_model
    from toolchain.teacher_cache import open_cache

    if _stored_as(recipe, out) is not None:
        return open_cache(_cache_folder(recipe, out), _cache_depends(recipe, teacher))
    return load_model(teacher.path)


def _cache_folder(recipe: Recipe, out: Path) -> Path:
    assert recipe.distill is not None
    assert recipe.distill.teacher_cache is not None
    elsewhere = recipe.distill.teacher_cache.path
    return out / "teacher-cache" / "teacher" if elsewhere is None else Path(elsewhere)


def _stored_as(recipe: Recipe, out: Path) -> str | None:
    """The number format of the teacher's stored features, if they are there."""
    spec = recipe.distill.teacher_cache if recipe.distill else None
    return spec.dtype if spec is not None and _cache_folder(recipe, out).is_dir() else None


def evaluated(recipe: Recipe) -> EvaluateSpec:
    """The recipe's evaluate section, whose sets are all there.

    Raises:
        UsageError: there is no such section, or a set of it is missing or wrong.
    """
    from toolchain.eval_sets import open_set

    if recipe.evaluate is None:
        raise UsageError(
            f"recipe {recipe.name} has no evaluate section, so that there is nothing to export for and report on; "
            "add one, or train only, with: clipkd distill"
        )
    for spec in recipe.evaluate.sets:
        if not isinstance(spec, str):  # glyphs are always there
            open_set(spec)
    return recipe.evaluate
