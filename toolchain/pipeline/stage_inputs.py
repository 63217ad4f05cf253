"""Collect the inputs of training stages from a recipe, and run a stage on one or several ranks."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolchain import torchrun
from toolchain.data.remote_files import without_query
from toolchain.distillation.training_options import TrainingOptions
from toolchain.errors import UsageError
from toolchain.pipeline.corpus import Corpus
from toolchain.progress import Screen
from toolchain.recipe.data import DataSpec
from toolchain.recipe.distill import DistillSpec
from toolchain.recipe.evaluate import EvaluateSpec
from toolchain.recipe.model import StudentSpec
from toolchain.recipe.quantize import QuantizeSpec
from toolchain.recipe.recipe import Recipe
from toolchain.stage import Stage, StageSpec, Work, open_stage, run_stage


@dataclass(frozen=True)
class TrainingInputs:
    """The recipe sections that training uses."""

    student: StudentSpec
    data: DataSpec
    distill: DistillSpec
    evaluate: EvaluateSpec | None
    seed: int

    @property
    def scoring(self) -> EvaluateSpec | None:
        """Return the evaluate section if the student is evaluated while it trains."""
        return self.evaluate if self.distill.evaluate_every else None

    def without_teacher(self) -> "TrainingInputs":
        """Return the same training without a teacher, neither to learn nor to inherit from."""
        return replace(self, distill=self.distill.without_teacher(), student=self.student.without_teacher())

    @property
    def corpus(self) -> Corpus:
        """The texts that the student's vocabulary is cut to; none if it is not cut."""
        return Corpus(self.student.vocabulary, self.data, self.evaluate, self.seed)


def training_inputs(recipe: Recipe) -> TrainingInputs:
    """Return the training inputs of a recipe with a distill section (the schema then requires a data section)."""
    assert recipe.distill is not None
    assert recipe.data is not None
    return TrainingInputs(recipe.student, recipe.data, recipe.distill, recipe.evaluate, recipe.seed)


def data_fields(spec: DataSpec) -> dict[str, Any]:
    """Return the fields of the data section that affect the trained weights."""
    without_effect = {"max_damaged": True, "cache_gb": True, "cache_dir": True}
    fields = spec.model_dump(exclude={**without_effect, "sources": {"__all__": without_effect}})
    for section in (fields, *fields.get("sources", ())):
        if "shards" in section:  # a URL may be signed anew
            section["shards"] = tuple(map(without_query, section["shards"]))
    return fields


def require_training_data(inputs: TrainingInputs, screen: Screen, quantize: QuantizeSpec | None = None) -> None:
    """Open the data once before any model is loaded, downloaded or trained, so a mistake in it costs no wait.

    Shards are indexed here for the first time; the stages that train find the index.  `quantize`: check its batch size
    too, because it reads the same data after the training.

    Raises:
        UsageError: files are missing, or contain fewer samples than one batch; or a batch cannot be split over the
            ranks and parts, or all steps are warm-up.
    """
    from toolchain.data.open import training_data
    from toolchain.distillation.distill import check_warmup, split_batch
    from toolchain.distributed import join_processes

    processes, distill = join_processes(), inputs.distill
    split_batch(distill, processes)
    if not inputs.data.is_stored:
        return
    with processes.first_alone():
        data = training_data(inputs.data, seed=inputs.seed, batch_size=distill.batch_size, progress=screen.progress)
        check_warmup(distill, distill.num_steps(data.steps_per_epoch))
        if quantize is not None and quantize.batch_size > distill.batch_size:
            size = quantize.batch_size
            training_data(inputs.data, seed=inputs.seed, batch_size=size, batch_size_field="quantize.batch_size")


def num_workers(spec: DataSpec, options: TrainingOptions, device: str) -> int:
    """Return the number of data loader processes per rank.

    Default: 0 for glyphs, which are cheap to draw; with a GPU, the cores that training leaves free.

    Training on a CPU uses all cores and takes far longer per image than loading, so one loader is enough.
    """
    if options.workers is not None:
        return options.workers
    if not spec.needs_loader_workers:
        return 0
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if device == "cpu" else max(1, usable // torchrun.local_world_size() - 1)


def run_stage_on_ranks(spec: StageSpec, work: Work, *, replace: bool) -> Stage:
    """Make a stage on the ranks started by torchrun: rank 0 locks the directory, all ranks do the work."""
    if torchrun.world_size() == 1:
        return run_stage(spec, work, replace=replace)
    from toolchain.distributed import join_processes

    processes = join_processes()
    if processes.leads:

        def work_with_others(folder: Path) -> dict[str, Any]:
            processes.broadcast(str(folder))
            return work(folder)

        stage = run_stage(spec, work_with_others, replace=replace)
        if stage.cached:
            processes.broadcast(None)
        processes.wait()
        return stage
    folder = processes.broadcast(None)
    if folder is not None:
        work(Path(folder))
    processes.wait()
    return open_stage(spec.path)


def require_evaluation(recipe: Recipe) -> EvaluateSpec:
    """Return the recipe's evaluate section after checking that all its sets exist.

    Raises:
        UsageError: the section is absent, or a set is missing or invalid.
    """
    from toolchain.evaluation.open_sets import open_set

    if recipe.evaluate is None:
        raise UsageError(
            f"recipe {recipe.name} has no evaluate section, which run, export and evaluate need "
            "(clipkd distill does not). Add one, as with "
            "--set 'evaluate={headline: mine, sets: [{kind: folder, name: mine, path: data/mine}]}'"
        )
    for spec in recipe.evaluate.sets:
        if not isinstance(spec, str):  # glyph sets always exist
            open_set(spec)
    return recipe.evaluate
