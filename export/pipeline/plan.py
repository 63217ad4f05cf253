"""Plan which models a recipe exports and measures, name their stages, and record a failure."""

from dataclasses import dataclass, replace
from pathlib import Path

from export.documents import PlannedExport
from toolchain.errors import ArtifactError, ClipkdError, Interrupted, MissingDependency, UsageError
from toolchain.filesystem import partial_path, write_json
from toolchain.precisions import REFERENCE_PRECISION
from toolchain.recipe.recipe import Recipe
from toolchain.runtimes import RUNTIMES

FAILED = "failed.json"


def mark_failed(path: Path, error: ClipkdError) -> None:
    """Record in a stage's partial directory why the stage failed; the directory is kept for inspection."""
    document = {"status": "failed", "exit_code": error.exit_code, "reason": str(error)}
    file = partial_path(path) / FAILED
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, document)


def is_of_the_model(error: ClipkdError) -> bool:
    """Return True if an error concerns one model; other errors stop the whole command."""
    return not isinstance(error, ArtifactError | Interrupted | MissingDependency | UsageError)


def shipped_role(recipe: Recipe) -> str:
    """Return the role of the model that a run ships."""
    return "student" if recipe.distill else "adopted"


def plan_exports(recipe: Recipe) -> list[PlannedExport]:
    """Return every model that a recipe exports.

    Teacher and baseline are not shipped. They are only for comparison, so one runtime is enough: the first that runs on
    this machine.
    """
    spec, shipped = recipe.export, shipped_role(recipe)
    others = (("teacher", "baseline") if recipe.baseline else ("teacher",)) if recipe.teacher else ()
    first = next((runtime for runtime in spec.runtimes if not RUNTIMES[runtime].is_kit), None)
    pairs = [(role, REFERENCE_PRECISION) for role in others] + [(shipped, precision) for precision in spec.precisions]
    return [
        PlannedExport(
            role,
            precision,
            runtime,
            opset=spec.opset,
            batch=spec.batch,
            uint8_input=spec.uint8_input and role == shipped and not RUNTIMES[runtime].is_kit,
        )
        for runtime in spec.runtimes
        for role, precision in pairs
        if runtime == first or role == shipped
    ]


def is_adaptable(source: PlannedExport, planned: PlannedExport, has_rounded_outputs: bool) -> bool:
    """Return True if the planned export can be made from another runtime's export, without tracing the towers again.

    `has_rounded_outputs` is True if an int8 checkpoint rounds outputs that some runtimes leave in float.
    """
    return (
        replace(source, runtime=planned.runtime, uint8_input=planned.uint8_input) == planned
        and not source.in_runtime.separates_products  # this rewrite cannot be undone
        and source.uint8_input >= planned.uint8_input
        # activations of a build kit's int8 towers are signed
        and (source.in_runtime.is_kit == planned.in_runtime.is_kit or not planned.in_precision.is_quantized)
        and (source.in_runtime.rounds_outputs == planned.in_runtime.rounds_outputs or not has_rounded_outputs)
    )


def select_kits(recipe: Recipe) -> Recipe:
    """Return the recipe with TensorRT build kits as its only runtimes, so that nothing else is exported again."""
    kits = tuple(runtime for runtime in recipe.export.runtimes if RUNTIMES[runtime].is_kit)
    return recipe.model_copy(update={"export": recipe.export.model_copy(update={"runtimes": kits})})


@dataclass(frozen=True)
class PlannedReference:
    """One checkpoint to measure in PyTorch."""

    role: str
    mode: str
    """eager or compiled."""

    beside: str
    """The name of its fp32 export, which provides the samples and the preprocessing for the measurement."""

    @property
    def name(self) -> str:
        return f"{self.role}-pytorch-{self.mode}"


def plan_references(recipe: Recipe) -> list[PlannedReference]:
    """Return every checkpoint that a recipe measures in PyTorch; empty if fp32 is not exported."""
    shipped = shipped_role(recipe)
    beside = [
        planned.name
        for planned in plan_exports(recipe)
        if (planned.role, planned.precision) == (shipped, REFERENCE_PRECISION)
    ]
    return [PlannedReference(shipped, mode, beside[0]) for mode in recipe.profile.pytorch if beside]


def stage_paths(recipe: Recipe) -> list[str]:
    """Return the stage directories that a recipe creates in a run."""
    teachers = list(recipe.teachers)
    trained = teachers + (["baseline"] if recipe.baseline else []) + ["student"]
    cache = recipe.distill.teacher_cache if recipe.distill else None
    if cache is not None and cache.path is None:
        trained[-1:-1] = [f"teacher-cache/{name}" for name in teachers]
    if recipe.distill is None:
        trained = ["adopted"]
    quantized = [f"{trained[-1]}-int8"] if recipe.export.is_quantized and recipe.quantize else []
    exported = plan_exports(recipe) if recipe.evaluate else []
    measured = [planned.name for planned in exported if not planned.in_runtime.is_kit]
    measured += [planned.name for planned in plan_references(recipe)] if recipe.evaluate else []
    return [
        *trained,
        *quantized,
        *(f"exported/{planned.name}" for planned in exported),
        *(f"measured/{name}/cpu" for name in measured),
        *(f"auto/{runtime}" for runtime in recipe.export.runtimes if recipe.export.auto),
    ]
