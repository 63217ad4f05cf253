"""The stages up to the float checkpoints: teacher, baseline and student.

Heavy packages are imported inside the work, so that a run whose stages are all complete needs none of them.
"""

from pathlib import Path
from typing import Any

from toolchain.data.open import fingerprint as fingerprint_data
from toolchain.errors import UsageError
from toolchain.pipeline.stage_inputs import (
    How,
    data_fields,
    num_workers,
    run_stage_on_ranks,
)
from toolchain.pipeline.teacher_cache import make_cache_stage, open_or_make_cache
from toolchain.progress import Screen
from toolchain.recipe.model import ModelSpec
from toolchain.recipe.recipe import Recipe
from toolchain.stage import Stage, StageSpec


def train_checkpoints(recipe: Recipe, out: Path, screen: Screen, how: How) -> dict[str, Stage]:
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
    from toolchain.distillation.compatibility import check_pair
    from toolchain.models.build import build_model
    from toolchain.recipe.load import teacher_recipe

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
    from toolchain.recipe.model_names import fingerprint

    def work(folder: Path) -> dict[str, Any]:
        from toolchain.models.build import build_model, save_model

        if how.leads:
            save_model(build_model(spec, seed=recipe.seed, say=screen.say), folder)
        return {"role": name, "source": spec.model_dump(exclude_defaults=True), "train_s": None}

    screen.starts(name)
    fields = {"seed": recipe.seed} if spec.is_random else {}
    stage = run_stage_on_ranks(
        how,
        StageSpec(out / name, kind="adopt", version=2, fields=fields, fingerprints={"model": fingerprint(spec)}),
        work,
    )
    screen.done(name, stage)
    return stage


def _train_one(recipe: Recipe, out: Path, name: str, teacher: Stage | None, screen: Screen, how: How) -> Stage:
    from toolchain.recipe.model_names import fingerprint

    spec, data_spec = recipe.distill, recipe.data
    assert spec is not None
    assert data_spec is not None
    if teacher is None:  # nothing it reads depends on the weights of losses it does not have
        alone = type(spec.loss_weights)(**dict.fromkeys(spec.loss_weights.model_dump(), 0.0) | {"task": 1.0})
        changes = {"loss_weights": alone, "teacher_cache": None, "teacher_precision": "fp32"}
        spec = spec.model_copy(update=changes | {"reference_compat": False})

    def work(folder: Path) -> dict[str, Any]:
        from toolchain.data.open import training_data
        from toolchain.distillation.distill import Engine, distil
        from toolchain.distributed import join_processes
        from toolchain.evaluation.open_sets import open_set
        from toolchain.evaluation.torch_encoders import headline_accuracy
        from toolchain.models.build import build_model, load_model

        student = build_model(recipe.student, seed=recipe.seed, say=screen.say)
        frozen: Any = None
        caching_s = 0.0
        if teacher and spec.teacher_cache:
            frozen, caching_s = open_or_make_cache(recipe, out, teacher, screen, how)
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
            num_workers(data_spec, how, processes.device.type),
            how.checkpoint_steps,
            60 * how.checkpoint_minutes,
            how.keep_checkpoints,
            data_spec.max_damaged,
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
    stage = run_stage_on_ranks(
        how,
        StageSpec(
            out / name,
            kind="distil",
            version=3,
            fields={
                "seed": recipe.seed,
                "data": data_fields(data_spec),
                "distill": spec.model_dump(exclude={"teacher_cache": {"path", "also"}}),  # they change no feature
            }
            | evaluated,
            fingerprints={"data": fingerprint_data(data_spec), "student": fingerprint(recipe.student)},
            inputs={"teacher": teacher} if teacher else {},
        ),
        work,
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
    return {
        f"teacher-cache/{name}": make_cache_stage(recipe, out, name, stage, screen, how) for name, stage in made.items()
    }


def _teacher(recipe: Recipe, out: Path, screen: Screen, how: How) -> Stage:
    from toolchain.recipe.load import teacher_recipe

    assert recipe.teacher is not None
    if recipe.teacher.recipe is not None:
        return _train_one(teacher_recipe(recipe.teacher), out, "teacher", None, screen, how)
    return _adopt(recipe, recipe.teacher, out, "teacher", screen, how)
