"""Measure models of a run on this machine's CPU as stages: every exported one, the PyTorch references, or one alone."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.documents import export_summary
from export.pipeline.cpu_measurement import Scoring, Subject, scoring
from export.pipeline.plan import plan_references
from toolchain.pipeline.stage_inputs import require_evaluation
from toolchain.progress import Screen
from toolchain.recipe.export import ProfileSpec
from toolchain.recipe.recipe import Recipe
from toolchain.runtimes import RUNTIMES
from toolchain.stage import Stage, run_stage

if TYPE_CHECKING:
    from export.profiling.protocol import Profile


def measure_on_cpu(
    subject: Subject,
    screen: Screen,
    *,
    scored: Scoring | None = None,
    timing: ProfileSpec | None = None,
    time: "Callable[[], Profile] | None" = None,
) -> Stage:
    """Return the measurement of a model, made or reused: its accuracy if `scored`, its latency if `timing`.

    A part that is not asked for stays as it was if it is of the same model and machine.  A latency that was measured
    for longer than `timing` asks is kept.  If `time` is given, it provides a new latency even if one is stored.

    Raises:
        GateError: the model's features here differ from those in PyTorch.
    """
    earlier = subject.earlier
    spec = subject.specify_parts(scored, timing, times_anew=time is not None)
    is_timed_now = timing is not None and (time is not None or spec.fields["profile"] != earlier.profile)
    is_scored_now = scored is not None and (earlier.evaluate, earlier.sets) != (
        spec.fields["evaluate"],
        scored.fingerprint,
    )

    def work(folder: Path) -> dict[str, Any]:
        from export.pipeline.measure_model import measure, time_alone

        timed = (time or (lambda: time_alone(subject, timing, screen.progress))) if is_timed_now else None
        return measure(subject, folder, scored.spec if scored and is_scored_now else None, timed, screen.progress)

    name = f"measured/{subject.name}"
    screen.starts(name)
    stage = run_stage(spec, work, again=time is not None)
    screen.done(name, stage)
    return stage


def measure_models(recipe: Recipe, out: Path, exported: dict[str, Stage], screen: Screen) -> dict[str, Stage]:
    """Return parity, accuracy and latency of each exported model, in its own runtime on this machine."""
    scored = scoring(require_evaluation(recipe))
    return {
        name: measure_on_cpu(Subject(out, model), screen, scored=scored, timing=recipe.profile)
        for name, model in exported.items()
        if not RUNTIMES[export_summary(model)["runtime"]].is_kit  # the engines of a build kit run on their device
    }


def require_references(recipe: Recipe) -> None:
    """Check, before hours of training, that the PyTorch references in the recipe can be measured.

    Raises:
        MissingDependency: the recipe asks for a compiled reference, and there is no C++ compiler.
    """
    from export.devices.run_runner import require_compiler

    if "compiled" in recipe.profile.pytorch:
        require_compiler()


def measure_references(
    recipe: Recipe, out: Path, made: dict[str, Stage], exported: dict[str, Stage], screen: Screen
) -> dict[str, Stage]:
    """Measure the checkpoint of the shipped model in PyTorch, once for each mode in `profile.pytorch`.

    Raises:
        MissingDependency: a compiled reference needs a C++ compiler, and there is none.
    """
    planned = [each for each in plan_references(recipe) if each.beside in exported]  # others failed and reported why
    if not planned:
        return {}
    scored = scoring(require_evaluation(recipe))
    subjects = {each.name: Subject(out, exported[each.beside], made[each.role], each.mode) for each in planned}
    return {
        name: measure_on_cpu(subject, screen, scored=scored, timing=recipe.profile)
        for name, subject in subjects.items()
    }
