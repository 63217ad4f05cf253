"""Quantize the student as a stage of `clipkd run`; with `export.auto`, a failure only rejects the int8 precisions."""

from pathlib import Path

from export.pipeline.plan import mark_failed, plan_exports
from toolchain.errors import ArtifactError, ClipkdError, Interrupted, UsageError
from toolchain.pipeline.quantize import quantize_checkpoint
from toolchain.progress import Screen
from toolchain.recipe.recipe import Recipe
from toolchain.stage import Stage


def quantize_or_reject(
    recipe: Recipe, out: Path, made: dict[str, Stage], screen: Screen, *, replace: bool = False
) -> dict[str, Stage]:
    """Return the int8 student; with `export.auto`, reject it if it cannot be made."""
    try:
        if recipe.quantize is None and recipe.export.is_quantized:
            raise UsageError("the recipe has no quantize section, which int8 needs")
        return quantize_checkpoint(recipe, out, made, screen, replace=replace)
    except ClipkdError as error:
        if recipe.export.auto is None or isinstance(error, ArtifactError | Interrupted):
            raise
        for planned in plan_exports(recipe):
            if planned.in_precision.is_quantized:
                mark_failed(out / "exported" / planned.name, error)
                screen.line(planned.name, f"failed: {error}")
        return {}
