"""Which models a recipe exports and measures, where their stages lie, and how a failure is recorded."""

from pathlib import Path

from toolchain.errors import ArtifactError, ClipkdError, Interrupted, MissingDependency, UsageError
from toolchain.filesystem import partial_path, write_json
from toolchain.recipe.recipe import Recipe

FAILED = "failed.json"


def mark_failed(path: Path, error: ClipkdError) -> None:
    """Say in a stage's unfinished directory why it will not become complete; it is kept for inspection."""
    document = {"status": "failed", "exit_code": error.exit_code, "reason": str(error)}
    file = partial_path(path) / FAILED
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, document)


def is_of_the_model(error: ClipkdError) -> bool:
    """Whether an error says that a model is no good, and not that the command cannot go on."""
    return not isinstance(error, ArtifactError | Interrupted | MissingDependency | UsageError)


def shipped_role(recipe: Recipe) -> str:
    """The role of the model that a run is for."""
    return "student" if recipe.distill else "adopted"


def exports(recipe: Recipe) -> list[tuple[str, str, str, str]]:
    """Name, role, runtime and precision of every exported model.

    Teacher and baseline do not ship: they are there to compare with, for which one runtime does, the first that runs
    here.
    """
    others = (("teacher", "baseline") if recipe.baseline else ("teacher",)) if recipe.teacher else ()
    first = next((runtime for runtime in recipe.export.runtimes if runtime != "tensorrt"), None)
    shipped = shipped_role(recipe)
    pairs = [(role, "fp32") for role in others] + [(shipped, precision) for precision in recipe.export.precisions]
    return [
        (f"{role}-{runtime}-{precision}", role, runtime, precision)
        for runtime in recipe.export.runtimes
        for role, precision in pairs
        if runtime == first or role == shipped
    ]


def references(recipe: Recipe) -> list[tuple[str, str, str, str]]:
    """Name, role, mode and the fp32 export beside it of every checkpoint that is measured in PyTorch."""
    shipped = shipped_role(recipe)
    beside = [name for name, role, _, precision in exports(recipe) if (role, precision) == (shipped, "fp32")]
    return [(f"{shipped}-pytorch-{mode}", shipped, mode, beside[0]) for mode in recipe.profile.pytorch if beside]


def stage_paths(recipe: Recipe) -> list[str]:
    """The directories in a run that a recipe asks for."""
    trained = (["teacher"] if recipe.teacher else []) + (["baseline"] if recipe.baseline else []) + ["student"]
    cache = recipe.distill.teacher_cache if recipe.distill else None
    if cache is not None and cache.path is None:
        trained.insert(-1, "teacher-cache/teacher")
    if recipe.distill is None:
        trained = ["adopted"]
    quantized = [f"{trained[-1]}-int8"] if recipe.export.is_quantized and recipe.quantize else []
    made = [(name, runtime) for name, _, runtime, _ in exports(recipe)] if recipe.evaluate else []
    measured = [f"measured/{name}/cpu" for name, runtime in made if runtime != "tensorrt"]
    measured += [f"measured/{name}/cpu" for name, *_ in references(recipe)] if recipe.evaluate else []
    chosen = [f"auto/{runtime}" for runtime in recipe.export.runtimes if recipe.export.auto]
    return trained + quantized + [f"exported/{name}" for name, _ in made] + measured + chosen
