"""The inputs that training stages take from a recipe, and a stage made by one rank or several."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolchain import torchrun
from toolchain.distillation.training_options import TrainingOptions
from toolchain.errors import UsageError
from toolchain.recipe.data import DataSpec
from toolchain.recipe.distill import DistillSpec
from toolchain.recipe.evaluate import EvaluateSpec
from toolchain.recipe.model import ModelSpec
from toolchain.recipe.recipe import Recipe
from toolchain.stage import Stage, StageSpec, Work, open_stage, run_stage


@dataclass(frozen=True)
class TrainingInputs:
    """The sections of a recipe that training reads, all of them there."""

    student: ModelSpec
    data: DataSpec
    distill: DistillSpec
    evaluate: EvaluateSpec | None
    seed: int

    @property
    def scoring(self) -> EvaluateSpec | None:
        """The evaluate section, if the student is scored while it trains."""
        return self.evaluate if self.distill.evaluate_every else None

    def without_teacher(self) -> "TrainingInputs":
        """Return the same training without a teacher."""
        return replace(self, distill=self.distill.without_teacher())


def training_inputs(recipe: Recipe) -> TrainingInputs:
    """Return what training reads of a recipe that has a distill section, and so, by its schema, a data section."""
    assert recipe.distill is not None
    assert recipe.data is not None
    return TrainingInputs(recipe.student, recipe.data, recipe.distill, recipe.evaluate, recipe.seed)


def data_fields(spec: DataSpec) -> dict[str, Any]:
    """Return the fields of the data section that decide what is trained: not when to give up."""
    return spec.model_dump(exclude={"max_damaged": True, "sources": {"__all__": {"max_damaged"}}})


def num_workers(spec: DataSpec, options: TrainingOptions, device: str) -> int:
    """Return the loader processes of each rank.

    Unless told: none for glyphs, which cost little to draw; beside a GPU the cores that training leaves free.

    Training on a CPU uses all its cores, and takes far longer for a picture than a loader does: one stays ahead of it.
    """
    if options.workers is not None:
        return options.workers
    if not spec.needs_loader_workers:
        return 0
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if device == "cpu" else max(1, usable // torchrun.world_size() - 1)


def run_stage_on_ranks(spec: StageSpec, work: Work) -> Stage:
    """Make a stage on the ranks that torchrun started: rank 0 holds the directory, the others work along."""
    if torchrun.world_size() == 1:
        return run_stage(spec, work)
    from toolchain.distributed import join_processes

    processes = join_processes()
    if processes.leads:

        def work_with_others(folder: Path) -> dict[str, Any]:
            processes.broadcast(str(folder))
            return work(folder)

        stage = run_stage(spec, work_with_others)
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
    """Return the recipe's evaluate section, whose sets are all there.

    Raises:
        UsageError: there is no such section, or a set of it is missing or wrong.
    """
    from toolchain.evaluation.open_sets import open_set

    if recipe.evaluate is None:
        raise UsageError(
            f"recipe {recipe.name} has no evaluate section, so that there is nothing to export for and report on; "
            "add one, or train only, with: clipkd distill"
        )
    for spec in recipe.evaluate.sets:
        if not isinstance(spec, str):  # glyphs are always there
            open_set(spec)
    return recipe.evaluate
