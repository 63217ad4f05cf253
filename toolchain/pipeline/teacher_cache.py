"""The stages that store a teacher's features, and how a later stage opens them."""

import json
from pathlib import Path
from typing import Any

from toolchain.data.open import fingerprint as fingerprint_data
from toolchain.pipeline.stage_inputs import How, data_fields, run_stage_on_ranks
from toolchain.progress import Screen
from toolchain.recipe.recipe import Recipe
from toolchain.stage import Stage, StageSpec, open_stage


def make_cache_stage(recipe: Recipe, out: Path, name: str, teacher: Stage, screen: Screen, how: How) -> Stage:
    """A teacher's features of every view and caption."""
    from toolchain.distillation.teacher_cache import refuse_foreign

    spec, data_spec = recipe.distill, recipe.data
    assert spec is not None
    assert spec.teacher_cache is not None
    assert data_spec is not None
    path, dtype = out / "teacher-cache" / name, spec.teacher_cache.dtype
    depends = _cache_depends(recipe, teacher)
    refuse_foreign(path, depends)

    def work(folder: Path) -> dict[str, Any]:
        from toolchain.data.open import training_data
        from toolchain.distillation.make_teacher_cache import make_cache
        from toolchain.distillation.teacher import live_teacher
        from toolchain.distributed import join_processes
        from toolchain.models.build import load_model

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
    stage = run_stage_on_ranks(how, StageSpec(path, kind="teacher-cache", version=1, fields=depends), work)
    screen.done(f"teacher-cache/{name}", stage)
    return stage


def open_or_make_cache(recipe: Recipe, out: Path, teacher: Stage, screen: Screen, how: How) -> tuple[Any, float]:
    """The cache that a student learns from, made first if it is this run's, and the seconds that making it took."""
    from toolchain.distillation.teacher_cache import open_cache

    assert recipe.distill is not None
    assert recipe.distill.teacher_cache is not None
    elsewhere = recipe.distill.teacher_cache.path
    depends = _cache_depends(recipe, teacher)
    if elsewhere is not None:
        cache = open_cache(Path(elsewhere), depends)
        if how.leads:
            open_stage(Path(elsewhere))
        return cache, 0.0
    stage = make_cache_stage(recipe, out, "teacher", teacher, screen, how)
    return open_cache(stage.path, depends), float(stage.manifest["took_s"])


def _cache_depends(recipe: Recipe, teacher: Stage) -> dict[str, Any]:
    """What decides the bytes of a teacher's features."""
    from toolchain.distillation.make_teacher_cache import SHARD_SAMPLES
    from toolchain.recipe.model_names import CONFIG, WEIGHTS

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
        "data": {**data_fields(data_spec), "fingerprint": fingerprint_data(data_spec)},
        "seed": recipe.seed,
        "views": data_spec.views,
        "dtype": spec.teacher_cache.dtype,
        "shard_samples": SHARD_SAMPLES,
    }


def cached_or_live_teacher(recipe: Recipe, out: Path, teacher: Stage) -> Any:
    """The features that the student learnt from, where they are still there; a few dozen batches pay for no new ones.

    Raises:
        ArtifactError: they belong to something else.
    """
    from toolchain.distillation.teacher_cache import open_cache
    from toolchain.models.build import load_model

    if stored_dtype(recipe, out) is not None:
        return open_cache(_cache_folder(recipe, out), _cache_depends(recipe, teacher))
    return load_model(teacher.path)


def _cache_folder(recipe: Recipe, out: Path) -> Path:
    assert recipe.distill is not None
    assert recipe.distill.teacher_cache is not None
    elsewhere = recipe.distill.teacher_cache.path
    return out / "teacher-cache" / "teacher" if elsewhere is None else Path(elsewhere)


def stored_dtype(recipe: Recipe, out: Path) -> str | None:
    """The number format of the teacher's stored features, if they are there."""
    spec = recipe.distill.teacher_cache if recipe.distill else None
    return spec.dtype if spec is not None and _cache_folder(recipe, out).is_dir() else None
