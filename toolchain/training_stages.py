"""The stages up to the checkpoints: the frozen teacher, the baseline, the student, and the int8 student.

Heavy packages are imported inside the work, so that a run whose stages are all complete needs none of them.
"""

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
    from toolchain.recipe import teacher_recipe

    if recipe.distill is None:
        return {"adopted": _adopt(recipe, recipe.student, out, "adopted", screen, how)}

    if not (out / "student").exists():
        _refuse_misfits(recipe, screen)
    if recipe.teacher is None:
        return {"student": _train_one(recipe, out, "student", None, screen, how)}
    if recipe.teacher.recipe is not None:
        teacher = _train_one(teacher_recipe(recipe.teacher), out, "teacher", None, screen, how)
    else:
        teacher = _adopt(recipe, recipe.teacher, out, "teacher", screen, how)
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
        changes = {"loss_weights": alone, "stored_teacher_features": False, "teacher_precision": "fp32"}
        spec = spec.model_copy(update=changes | {"reference_compat": False})

    def work(folder: Path) -> dict[str, Any]:
        from toolchain.distil import Engine, distil
        from toolchain.eval_sets import open_set
        from toolchain.feed import training_data
        from toolchain.models import build_model, load_model
        from toolchain.processes import join_processes
        from toolchain.validate import headline_accuracy

        student = build_model(recipe.student, seed=recipe.seed, say=screen.say)
        frozen = load_model(teacher.path) if teacher else None
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
        return {"role": name} | trained

    screen.starts(name)
    evaluated = {"headline": recipe.evaluate.headline} if spec.evaluate_every and recipe.evaluate else {}
    stage = _make_stage(
        how,
        out / name,
        kind="distil",
        version=3,
        fields={"seed": recipe.seed, "data": _data_fields(data_spec), "distill": spec.model_dump()} | evaluated,
        fingerprints={"data": _data_fingerprint(data_spec), "student": fingerprint(recipe.student)},
        inputs={"teacher": teacher} if teacher else {},
        work=work,
    )
    screen.done(name, stage)
    return stage


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
    if spec is None or "int8" not in recipe.export.precisions:
        return {}
    from toolchain.stages import run_stage

    role = "student" if recipe.distill else "adopted"
    name, student, teacher = f"{role}-int8", made[role], made.get("teacher")
    data_spec = recipe.data
    assert data_spec is not None
    weights = recipe.distill.loss_weights if recipe.distill else LossWeights()

    def work(folder: Path) -> dict[str, Any]:
        from toolchain.feed import training_data
        from toolchain.finetune import quantize_student
        from toolchain.models import load_model

        data = training_data(data_spec, seed=recipe.seed, batch_size=spec.batch_size)
        frozen = load_model(teacher.path) if teacher else None
        float_student = load_model(student.path)
        quantized = quantize_student(
            spec, weights, float_student, frozen, data, folder, screen.progress, seed=recipe.seed
        )
        return {"role": role} | quantized

    screen.starts(name)
    stage = run_stage(
        out / name,
        kind="quantize",
        version=3,
        fields={
            "seed": recipe.seed,
            "data": _data_fields(data_spec),
            "quantize": spec.model_dump(),
            "loss_weights": weights.model_dump(),
        },
        fingerprints={"data": _data_fingerprint(data_spec)},
        inputs={"student": student} | ({"teacher": teacher} if teacher else {}),
        work=work,
    )
    screen.done(name, stage)
    return {name: stage}


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
