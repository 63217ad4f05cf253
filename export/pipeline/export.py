"""Export every model of a recipe as its own stage, which is complete only after the parity check with PyTorch passes.

Heavy packages are imported inside the work, so that a run whose stages are all complete needs none of them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.documents import ExportSummary, PlannedExport
from export.pipeline.plan import FAILED, is_of_the_model, mark_failed, plan_exports, shipped_role
from toolchain.errors import ClipkdError, GateError, UnavailableBackend
from toolchain.pipeline.stage_inputs import require_evaluation
from toolchain.precisions import PRECISIONS
from toolchain.progress import Screen
from toolchain.recipe.recipe import Recipe
from toolchain.runtimes import runtime_that_computes_alone
from toolchain.stage import Stage, StageSpec, run_stage

if TYPE_CHECKING:
    from export.graphs.export_onnx import FrozenTowers
    from toolchain.models.clip_model import ClipModel


def export_models(recipe: Recipe, out: Path, made: dict[str, Stage], screen: Screen) -> dict[str, Stage]:
    """Return the exported models by name: those that passed the parity check, now or in an earlier call.

    A model that fails is marked as failed, and the others are still exported.

    Raises:
        GateError, UnavailableBackend: after all exports, if any model failed other than a candidate of `export.auto`.
    """
    from toolchain.evaluation.open_sets import fingerprint

    exported: dict[str, Stage] = {}
    headline = fingerprint(require_evaluation(recipe).headline_set)
    failures: list[ClipkdError] = []
    for planned in plan_exports(recipe):
        if planned.in_precision.is_quantized and planned.checkpoint not in made:
            continue  # `quantize` reported why
        checkpoint = made[planned.checkpoint]
        spec = export_spec(planned, recipe, out, checkpoint, headline)
        screen.starts(planned.name)
        try:
            exported[planned.name] = run_stage(spec, partial(_export_and_prove, planned, recipe, checkpoint, screen))
        except ClipkdError as error:  # continue with the other models
            is_candidate = recipe.export.auto is not None and planned.role == shipped_role(recipe)
            if not (is_of_the_model(error) if is_candidate else isinstance(error, GateError | UnavailableBackend)):
                raise
            mark_failed(spec.path, error)
            screen.line(planned.name, f"failed: {error}")
            failures += [] if is_candidate else [error]
        else:
            screen.done(planned.name, exported[planned.name])
    if failures:
        kind = GateError if any(isinstance(error, GateError) for error in failures) else UnavailableBackend
        raise kind("\n".join(map(str, failures)))
    return exported


def export_spec(planned: PlannedExport, recipe: Recipe, out: Path, checkpoint: Stage, headline: str) -> StageSpec:
    """Return the stage that exports one model; `headline` is the fingerprint of the headline set."""
    return StageSpec(
        out / "exported" / planned.name,
        kind="export",
        version=5,
        fields={
            "runtime": planned.runtime,
            "precision": planned.precision,
            "opset": planned.opset,
            "batch": planned.batch,
            "uint8_input": planned.uint8_input,
            "headline": require_evaluation(recipe).headline,
            "provenance": _provenance(recipe, checkpoint),
        },
        fingerprints={"headline": headline},
        inputs={"checkpoint": checkpoint},
    )


def _export_and_prove(
    planned: PlannedExport, recipe: Recipe, checkpoint: Stage, screen: Screen, folder: Path
) -> dict[str, Any]:
    """Export one model into `folder` and check its parity with PyTorch; return its `ExportSummary`.

    The model gets a model card and, if it is a TensorRT build kit, the files that its device needs.

    Raises:
        GateError: a graph does not compute in its runtime what PyTorch does, or exceeds the range of fp16.
        UnavailableBackend: the runtime does not compute in the precision.
    """
    alone = runtime_that_computes_alone(planned.precision)
    if alone is not None and alone != planned.in_runtime:  # fail now; the parity check would fail minutes later
        instead = f"export {PRECISIONS[planned.precision].instead} for {planned.runtime}"
        raise UnavailableBackend(f"{planned.name}: only {alone.title} computes in {planned.precision}; {instead}")

    from export.graphs.export_onnx import export_onnx
    from export.graphs.model_card import write_card
    from export.graphs.tensorrt_kit import complete_kit, write_sums
    from export.proof.prove import prove
    from toolchain.evaluation.open_sets import open_set
    from toolchain.models.build import load_model
    from toolchain.models.towers import example_pixels

    (folder / FAILED).unlink(missing_ok=True)  # left by an earlier attempt
    model = load_model(checkpoint.path)
    frozen = _freeze_towers(planned, checkpoint, model) if planned.in_precision.is_quantized else None
    screen.progress("to ONNX", 0, 2)
    graphs = export_onnx(model, folder, planned, open_set(require_evaluation(recipe).headline_set), frozen)
    screen.progress("parity", 1, 2)
    # The engines of a kit do not exist yet, so its graphs are checked in a runtime that can run them.
    runtime = planned.in_runtime.graphs_open_in
    proof = prove(folder, runtime=runtime, precision=planned.precision, uint8_input=planned.uint8_input)
    summary: ExportSummary = {**graphs, **proof}
    if planned.in_runtime.is_kit:
        height, width = example_pixels(model.net).shape[-2:]
        complete_kit(folder, (height, width))
    write_card(folder, f"{recipe.name}: {planned.name}", summary, _provenance(recipe, checkpoint))
    if planned.in_runtime.is_kit:
        write_sums(folder)
    return {**summary}


def _freeze_towers(planned: PlannedExport, checkpoint: Stage, model: ClipModel) -> FrozenTowers:
    """Return the towers of an int8 checkpoint, rounded as in its graphs; activations are signed for TensorRT."""
    from export.graphs.export_onnx import FrozenTowers
    from toolchain.data.glyphs import TEMPLATES
    from toolchain.models.towers import example_pixels
    from toolchain.quantization.checkpoint import load_quantized
    from toolchain.quantization.freeze import freeze, sign_activations

    image, text = load_quantized(checkpoint.path, model)
    if planned.in_runtime.is_kit:
        sign_activations(image, text)
    return FrozenTowers(freeze(image, example_pixels(model.net)), freeze(text, model.tokenize(list(TEMPLATES))))


def _provenance(recipe: Recipe, checkpoint: Stage) -> dict[str, Any]:
    """Return the origin of a model for its card: names and settings of the recipe, and the checkpoint's hash.

    Absolute paths are shortened to the file name, because a card is passed on to others and a recipe is not.
    """

    def describe(section: Any) -> Any:
        if section is None:
            return "none"
        fields = section.model_dump(mode="json", exclude_none=True)
        return {
            key: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
            for key, value in fields.items()
        }

    return {
        "checkpoint": f"sha256 {checkpoint.digest}",
        "teacher": describe(recipe.teacher),
        "student": describe(recipe.student),
        "data": describe(recipe.data),
    } | ({"licence of the data": recipe.data.licence} if recipe.data and recipe.data.licence else {})
