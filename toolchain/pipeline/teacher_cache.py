"""Make the stages that store teacher features, and open them for later stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain import torchrun
from toolchain.data.open import fingerprint as fingerprint_data
from toolchain.distillation.training_options import TrainingOptions
from toolchain.filesystem import read_json
from toolchain.pipeline.stage_inputs import TrainingInputs, data_fields, num_workers, run_stage_on_ranks
from toolchain.progress import Screen
from toolchain.recipe.distill import TeacherCacheSpec
from toolchain.recipe.model_names import CONFIG, WEIGHTS
from toolchain.stage import Stage, StageSpec, open_stage


@dataclass(frozen=True)
class CacheInputs:
    """A teacher, the training that uses its stored features, and their location."""

    training: TrainingInputs
    spec: TeacherCacheSpec
    teacher: Stage
    out: Path
    """The run directory."""

    name: str = "teacher"

    @property
    def own_folder(self) -> Path:
        """Return the folder in which this run stores the features."""
        return self.out / "teacher-cache" / self.name

    @property
    def folder(self) -> Path:
        """Return the folder that the features are read from: this run's or another run's."""
        return self.own_folder if self.spec.path is None else Path(self.spec.path)


def cache_spec(inputs: CacheInputs) -> StageSpec:
    """Return the stage that stores a teacher's features; it reads the finished teacher's files."""
    return StageSpec(inputs.own_folder, kind="teacher-cache", version=1, fields=_depends(inputs), resumes=True)


def make_cache_stage(inputs: CacheInputs, screen: Screen, options: TrainingOptions) -> Stage:
    """Store a teacher's features of every view and caption."""
    name, spec = f"teacher-cache/{inputs.name}", cache_spec(inputs)
    screen.starts(name)
    stage = run_stage_on_ranks(
        spec,
        lambda folder: _store_features(inputs, dict(spec.fields), folder, screen, options),
        replace=options.replace,
    )
    screen.done(name, stage)
    return stage


def _store_features(
    inputs: CacheInputs, depends: dict[str, Any], folder: Path, screen: Screen, options: TrainingOptions
) -> dict[str, Any]:
    """Run the teacher; return what the manifest records."""
    from toolchain.data.open import training_data
    from toolchain.distillation.make_teacher_cache import CachePlan, make_cache
    from toolchain.distillation.teacher import live_teacher
    from toolchain.distributed import join_processes
    from toolchain.models.build import load_model

    training = inputs.training
    distill, seed = training.distill, training.seed
    processes = join_processes()
    teacher = load_model(inputs.teacher.path)
    live = live_teacher(teacher, distill.teacher_precision, processes.device, compiled=distill.compile)
    with processes.first_alone():  # shards are indexed once
        data = training_data(
            training.data, seed=seed, batch_size=distill.batch_size, progress=screen.progress, say=screen.say
        )
    steps = distill.num_steps(data.steps_per_epoch)
    workers = num_workers(training.data, options, processes.device.type)
    plan = CachePlan(depends, inputs.spec.dtype, num_views=depends["views"], steps=steps, workers=workers)
    return make_cache(live, data, folder, plan, screen.progress, processes=processes, say=screen.say)


def open_or_make_caches(inputs: Sequence[CacheInputs], screen: Screen, options: TrainingOptions) -> tuple[Any, float]:
    """Return the caches of all teachers that a student learns from, as one, and the seconds to make those it lacks."""
    from toolchain.distillation.teacher_cache import TeacherCaches

    caches, seconds = zip(*(_open_or_make_cache(each, screen, options) for each in inputs), strict=True)
    return caches[0] if len(caches) == 1 else TeacherCaches(caches), sum(seconds)


def _open_or_make_cache(inputs: CacheInputs, screen: Screen, options: TrainingOptions) -> tuple[Any, float]:
    """Return the cache that a student learns from and the seconds to make it; make it if it belongs to this run."""
    from toolchain.distillation.teacher_cache import open_cache

    if inputs.spec.path is not None:
        cache = open_cache(inputs.folder, _depends(inputs))
        if torchrun.leads():
            open_stage(inputs.folder)
        return cache, 0.0
    stage = make_cache_stage(inputs, screen, options)
    return open_cache(stage.path, _depends(inputs)), float(stage.manifest["took_s"])


def find_cache(inputs: TrainingInputs, out: Path, teacher: Stage) -> CacheInputs | None:
    """Return the stored features that the student learned from, if they still exist."""
    if inputs.distill.teacher_cache is None:
        return None
    cache = CacheInputs(inputs, inputs.distill.teacher_cache, teacher, out)
    return cache if cache.folder.is_dir() else None


def open_found_cache(inputs: CacheInputs) -> Any:
    """Open stored features that `find_cache` found.

    Raises:
        ArtifactError: the features were made from other inputs.
    """
    from toolchain.distillation.teacher_cache import open_cache

    return open_cache(inputs.folder, _depends(inputs))


def _depends(inputs: CacheInputs) -> dict[str, Any]:
    """Return everything that determines the bytes of the teacher's features."""
    from toolchain.distillation.make_teacher_cache import SHARD_SAMPLES

    training, teacher = inputs.training, inputs.teacher
    config = read_json(teacher.path / CONFIG)
    files = dict(teacher.manifest["files"])
    tokenizer = {name: digest for name, digest in files.items() if name.startswith(("tokenizer", "vocab", "merges"))}
    return {
        "teacher": {
            "weights": files[WEIGHTS],
            "architecture": config["model_cfg"],
            "transform": config["preprocess_cfg"],
            "tokenizer": tokenizer,
            "precision": training.distill.teacher_precision,
        },
        "data": {**data_fields(training.data), "fingerprint": fingerprint_data(training.data)},
        "seed": training.seed,
        "views": training.data.views,
        "dtype": inputs.spec.dtype,
        "shard_samples": SHARD_SAMPLES,
    }
