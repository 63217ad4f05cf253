"""What training stages depend on, and how one is run by several ranks."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import UsageError
from toolchain.recipe.data import DataSpec
from toolchain.recipe.evaluate import EvaluateSpec
from toolchain.recipe.recipe import Recipe
from toolchain.stage import Stage, StageSpec, Work, open_stage, run_stage


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


def data_fields(spec: DataSpec) -> dict[str, Any]:
    """What of the data section decides what is trained: not when to give up."""
    return spec.model_dump(exclude={"max_damaged": True, "sources": {"__all__": {"max_damaged"}}})


def num_workers(spec: DataSpec, how: How, device: str) -> int:
    """Unless told: none for glyphs, which cost little to draw; beside a GPU the cores that training leaves free.

    Training on a CPU uses all its cores, and takes far longer for a picture than a loader does: one stays ahead of it.
    """
    if how.workers is not None:
        return how.workers
    if not spec.needs_loader_workers:
        return 0
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if device == "cpu" else max(1, usable // how.size - 1)


def run_stage_on_ranks(how: How, spec: StageSpec, work: Work) -> Stage:
    """A stage of one process, or of those that torchrun started: the first makes it, the others work along."""
    if how.size == 1:
        return run_stage(spec, work)
    from toolchain.distributed import join_processes

    together = join_processes()
    if together.leads:

        def working(folder: Path) -> dict[str, Any]:
            together.share(str(folder))
            return work(folder)

        stage = run_stage(spec, working)
        if stage.cached:
            together.share(None)
        together.wait()
        return stage
    folder = together.share(None)
    if folder is not None:
        work(Path(folder))
    together.wait()
    return open_stage(spec.path)


def evaluated(recipe: Recipe) -> EvaluateSpec:
    """The recipe's evaluate section, whose sets are all there.

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
