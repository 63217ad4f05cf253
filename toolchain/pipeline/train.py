"""Make the stages of the float checkpoints: teacher, baseline and student.

Heavy packages are imported inside the work, so a run with all stages complete does not need them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolchain import torchrun
from toolchain.data.open import fingerprint as fingerprint_data
from toolchain.distillation.training_options import TrainingOptions
from toolchain.errors import UsageError
from toolchain.pipeline.corpus import Corpus
from toolchain.pipeline.stage_inputs import (
    TrainingInputs,
    data_fields,
    num_workers,
    require_training_data,
    run_stage_on_ranks,
    training_inputs,
)
from toolchain.pipeline.teacher_cache import CacheInputs, make_cache_stage, open_or_make_caches
from toolchain.progress import Screen
from toolchain.recipe.model import ModelSpec, StudentSpec, TeacherSpec
from toolchain.recipe.recipe import Recipe
from toolchain.stage import Stage, StageSpec

_NO_OPTIONS = TrainingOptions()


def train_checkpoints(
    recipe: Recipe, out: Path, screen: Screen, options: TrainingOptions = _NO_OPTIONS
) -> dict[str, Stage]:
    """Make the frozen teacher, the student and, with `baseline: true`, the same student trained without the teacher.

    A recipe without training makes only the adopted model.
    """
    if recipe.distill is None:
        corpus = Corpus(recipe.student.vocabulary, recipe.data, recipe.evaluate, recipe.seed)
        return {"adopted": _adopt(recipe.student, recipe.seed, out / "adopted", screen, options, corpus)}
    inputs = training_inputs(recipe)
    if not (out / "student").exists():
        require_training_data(inputs, screen, recipe.quantize if recipe.export.is_quantized else None)
        _refuse_misfits(inputs, list(recipe.teachers.values()), screen)
    if recipe.teacher is None:
        return {"student": _train_one(inputs, out, "student", {}, screen, options)}
    teachers = _make_teachers(recipe, out, screen, options)
    made = {"teacher": teachers["teacher"]}  # the others are not exported
    if recipe.baseline:
        made["baseline"] = _train_one(inputs, out, "baseline", {}, screen, options)
    return made | {"student": _train_one(inputs, out, "student", teachers, screen, options)}


def _refuse_misfits(inputs: TrainingInputs, teacher_specs: Sequence[TeacherSpec], screen: Screen) -> None:
    """Raise an error for models that cannot be trained together, before anything is read, downloaded or trained."""
    from toolchain.distillation.compatibility import check_pair
    from toolchain.models.build import build_model
    from toolchain.models.inherit import check_inheritance
    from toolchain.models.teacher_text import build_on_text_tower
    from toolchain.recipe.load import teacher_recipe

    without_weights = {"pretrained": None, "checkpoint": None, "init": "random"}
    specs = [teacher_recipe(spec).student if spec.recipe else spec for spec in teacher_specs]
    teachers = [build_model(spec.model_copy(update=without_weights), seed=0, say=screen.say) for spec in specs]
    untrained = inputs.student.model_copy(update=without_weights | {"inherit": None, "vocabulary": ()})
    if inputs.student.has_teachers_text:
        has_weights = not inputs.student.is_random
        student = build_on_text_tower(untrained, teachers[0], seed=0, has_weights=has_weights, say=screen.say)
    else:
        student = build_model(untrained, seed=0, say=screen.say)
    for teacher in (*teachers,) or (None,):
        check_pair(student, teacher, inputs.distill.loss_weights)
    inherit = inputs.student.inherit
    if inputs.student.inherits_from_teacher:
        check_inheritance(teachers[0], student)
    elif inherit is not None:
        check_inheritance(build_model(inherit.model_copy(update=without_weights), seed=0, say=screen.say), student)


def adopt_spec(model: ModelSpec, seed: int, path: Path, corpus: Corpus | None = None) -> StageSpec:
    """Return the stage that saves an existing model; a student's vocabulary may be cut to the texts of a corpus."""
    from toolchain.recipe.model_names import fingerprint

    texts = {} if corpus is None else corpus.fingerprints()
    fields: dict[str, Any] = {"seed": seed} if model.is_random else {}
    if corpus is not None and "data" in corpus.names and corpus.data is not None:
        fields["data"] = data_fields(corpus.data)  # which captions are read
    return StageSpec(
        path,
        kind="adopt",
        version=2,
        fields=fields,
        fingerprints={"model": fingerprint(model)} | texts,
        described={"model": describe_model(model)},
    )


def describe_model(model: ModelSpec) -> dict[str, Any]:
    """Return the fields of a model that a recipe sets."""
    return model.model_dump(mode="json", exclude_defaults=True)


def _adopt(
    spec: ModelSpec, seed: int, path: Path, screen: Screen, options: TrainingOptions, corpus: Corpus | None = None
) -> Stage:
    """Save a model from any source as an open_clip local-dir in the run."""
    name = path.name

    def work(folder: Path) -> dict[str, Any]:
        from toolchain.models.build import build_model, save_model
        from toolchain.models.student import build_student

        started: dict[str, Any] = {}
        if torchrun.leads():
            if isinstance(spec, StudentSpec):
                texts = corpus.read() if corpus else ()
                model, started = build_student(spec, seed=seed, texts=texts, say=screen.say)
            else:
                model = build_model(spec, seed=seed, say=screen.say)
            save_model(model, folder)
        return {"role": name, "source": spec.model_dump(exclude_defaults=True), "train_s": None} | started

    screen.starts(name)
    stage = run_stage_on_ranks(adopt_spec(spec, seed, path, corpus), work, replace=options.replace)
    screen.done(name, stage)
    return stage


def train_spec(inputs: TrainingInputs, path: Path, teachers: Mapping[str, Stage]) -> StageSpec:
    """Return the stage that trains a student, with its teachers by name or alone."""
    from toolchain.recipe.model_names import fingerprint

    if not teachers:  # without a teacher, the weights of teacher losses must not affect the key
        inputs = inputs.without_teacher()
    scoring = {"headline": inputs.scoring.headline} if inputs.scoring else {}
    return StageSpec(
        path,
        kind="distil",
        version=3,
        fields={
            "seed": inputs.seed,
            "data": data_fields(inputs.data),
            "distill": inputs.distill.key_fields(),
        }
        | scoring,
        fingerprints={"data": fingerprint_data(inputs.data), "student": fingerprint(inputs.student)}
        | inputs.corpus.fingerprints(),
        inputs=teachers,
        described={"student": describe_model(inputs.student)},
        resumes=True,
    )


def _train_one(
    inputs: TrainingInputs,
    out: Path,
    name: str,
    teachers: Mapping[str, Stage],
    screen: Screen,
    options: TrainingOptions,
) -> Stage:
    """Train a student, with its teachers by name or alone."""
    if not teachers:
        inputs = inputs.without_teacher()
    screen.starts(name)
    spec = train_spec(inputs, out / name, teachers)
    stage = run_stage_on_ranks(
        spec, lambda folder: _train(inputs, spec, folder, teachers, screen, options), replace=options.replace
    )
    screen.done(name, stage)
    return stage


def _train(
    inputs: TrainingInputs,
    stage: StageSpec,
    folder: Path,
    teachers: Mapping[str, Stage],
    screen: Screen,
    options: TrainingOptions,
) -> dict[str, Any]:
    """Do the work of a training stage; return what its manifest records."""
    from toolchain.data.open import training_data
    from toolchain.data.shared_captions import warn_of_shared_captions
    from toolchain.distillation.distill import Training, distill
    from toolchain.distributed import join_processes
    from toolchain.evaluation.open_sets import open_set
    from toolchain.evaluation.torch_encoders import headline_accuracy
    from toolchain.models.build import load_model, read_config
    from toolchain.models.student import build_student
    from toolchain.pipeline.teacher_advice import advise_on_models

    out, name, spec = stage.path.parent, stage.path.name, inputs.distill
    teacher = teachers.get("teacher")
    texts, source = inputs.corpus.read(), teacher.path if teacher else None
    student, started = build_student(inputs.student, seed=inputs.seed, texts=texts, teacher=source, say=screen.say)
    frozen: Any = None
    caching_s = 0.0
    if teacher and spec.teacher_cache:
        stored = [CacheInputs(inputs, spec.teacher_cache, made, out, role) for role, made in teachers.items()]
        frozen, caching_s = open_or_make_caches(stored, screen, options)
        screen.starts(name)
    elif teacher:
        frozen = load_model(teacher.path)
    processes = join_processes()
    with processes.first_alone():  # shards are indexed once
        data = training_data(
            inputs.data, seed=inputs.seed, batch_size=spec.batch_size, progress=screen.progress, say=screen.say
        )
    for warning in warn_of_shared_captions(data, spec.loss_weights, spec.batch_size):
        screen.say(warning)
    if teacher:
        for advice in advise_on_models(read_config(teacher.path)["model_cfg"], student.config["model_cfg"]):
            screen.say(advice)
    training = Training(
        spec,
        student,
        frozen,
        data,
        seed=inputs.seed,
        max_damaged=inputs.data.max_damaged,
        accuracy=headline_accuracy(open_set(inputs.scoring.headline_set)) if inputs.scoring else None,
    )
    workers = num_workers(inputs.data, options, processes.device.type)
    trained = distill(
        training,
        folder,
        screen.progress,
        options=replace(options, workers=workers),
        processes=processes,
        say=screen.say,
    )
    train_s = round(trained["train_s"] + caching_s, 1)  # includes the time to store the teacher's features
    return {"role": name, "teacher_s": caching_s} | trained | {"train_s": train_s} | started


def cache_teachers(
    recipe: Recipe, out: Path, screen: Screen, options: TrainingOptions = _NO_OPTIONS
) -> dict[str, Stage]:
    """Store the features of the recipe's teachers and of its `also` teachers, one stage each."""
    spec = recipe.distill
    if spec is None or spec.teacher_cache is None or recipe.teacher is None:
        raise UsageError(
            f"recipe {recipe.name} has no distill.teacher_cache; add it with --set distill.teacher_cache={{}}, and "
            "data.views: the number of augmentations of each sample to store"
        )
    if spec.teacher_cache.path is not None:
        raise UsageError("distill.teacher_cache.path refers to an existing cache; remove path to make a cache")
    if not (out / "teacher-cache" / "teacher").exists():
        require_training_data(training_inputs(recipe), screen)
    made = _make_teachers(recipe, out, screen, options)
    for number, further in enumerate(spec.teacher_cache.also, len(made) + 1):
        name = f"teacher-{number}"
        made[name] = _adopt(further, recipe.seed, out / name, screen, options)
    inputs = training_inputs(recipe)
    caches = {name: CacheInputs(inputs, spec.teacher_cache, stage, out, name) for name, stage in made.items()}
    return {f"teacher-cache/{name}": make_cache_stage(cache, screen, options) for name, cache in caches.items()}


def _make_teachers(recipe: Recipe, out: Path, screen: Screen, options: TrainingOptions) -> dict[str, Stage]:
    """Train each teacher with its own recipe, or save the existing model."""
    from toolchain.recipe.load import teacher_recipe

    made = {}
    for name, spec in recipe.teachers.items():
        if spec.recipe is not None:
            made[name] = _train_one(training_inputs(teacher_recipe(spec)), out, name, {}, screen, options)
        else:
            made[name] = _adopt(spec, recipe.seed, out / name, screen, options)
    return made
