"""Export every model of a recipe as a stage of its own, proven equal to its PyTorch model before it counts as made.

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
    """Return the exported models by name: those that were exported and proven, now or by an earlier call.

    One that fails is marked failed, and the others are still made.

    Raises:
        GateError, UnavailableBackend: at the end, if a model failed that is no candidate of `export.auto`.
    """
    from toolchain.evaluation.open_sets import fingerprint

    exported: dict[str, Stage] = {}
    headline = fingerprint(require_evaluation(recipe).headline_set)
    failures: list[ClipkdError] = []
    for planned in plan_exports(recipe):
        if planned.in_precision.is_quantized and planned.checkpoint not in made:
            continue  # `quantize` said why
        checkpoint = made[planned.checkpoint]
        spec = _stage_of(planned, recipe, out, checkpoint, headline)
        screen.starts(planned.name)
        try:
            exported[planned.name] = run_stage(spec, partial(_export_and_prove, planned, recipe, checkpoint, screen))
        except ClipkdError as error:  # the others are still worth having
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


def _stage_of(planned: PlannedExport, recipe: Recipe, out: Path, checkpoint: Stage, headline: str) -> StageSpec:
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
    """Write one exported model into `folder`, with its card and, if it is a kit, what its device needs.

    Returns its `ExportSummary`.

    Raises:
        GateError: a graph does not compute in its runtime what PyTorch does, or fp16 cannot hold it.
        UnavailableBackend: the runtime does not compute in the precision.
    """
    alone = runtime_that_computes_alone(planned.precision)
    if alone is not None and alone != planned.in_runtime:  # its proof would say so, minutes later
        instead = f"export {PRECISIONS[planned.precision].instead} for {planned.runtime}"
        raise UnavailableBackend(f"{planned.name}: {alone.title} alone computes in {planned.precision}; {instead}")

    from export.graphs.export_onnx import export_onnx
    from export.graphs.model_card import write_card
    from export.graphs.tensorrt_kit import complete_kit, write_sums
    from export.proof.prove import prove
    from toolchain.evaluation.open_sets import open_set
    from toolchain.models.build import load_model
    from toolchain.models.towers import example_pixels

    (folder / FAILED).unlink(missing_ok=True)  # of an earlier attempt
    model = load_model(checkpoint.path)
    frozen = _freeze_towers(planned, checkpoint, model) if planned.in_precision.is_quantized else None
    screen.progress("to ONNX", 0, 2)
    graphs = export_onnx(model, folder, planned, open_set(require_evaluation(recipe).headline_set), frozen)
    screen.progress("parity", 1, 2)
    # A kit's graphs are proven where they can be run: its engines do not exist yet.
    proven_in = planned.in_runtime.graphs_open_in
    proof = prove(folder, runtime=proven_in, precision=planned.precision, uint8_input=planned.uint8_input)
    summary: ExportSummary = {**graphs, **proof}
    if planned.in_runtime.is_kit:
        height, width = example_pixels(model.net).shape[-2:]
        complete_kit(folder, (height, width))
    write_card(folder, f"{recipe.name}: {planned.name}", summary, _provenance(recipe, checkpoint))
    if planned.in_runtime.is_kit:
        write_sums(folder)
    return {**summary}


def _freeze_towers(planned: PlannedExport, checkpoint: Stage, model: ClipModel) -> FrozenTowers:
    """Return the towers of an int8 checkpoint, rounded as its graphs will be; a kit's activations are signed."""
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
    """Return where a model came from, for its card: names and settings of the recipe, the checkpoint's hash.

    Of a path only its name: a card travels further than a recipe.
    """

    def said(section: Any) -> Any:
        if section is None:
            return "none"
        fields = section.model_dump(mode="json", exclude_none=True)
        return {
            key: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
            for key, value in fields.items()
        }

    return {
        "checkpoint": f"sha256 {checkpoint.digest}",
        "teacher": said(recipe.teacher),
        "student": said(recipe.student),
        "data": said(recipe.data),
    } | ({"licence of the data": recipe.data.licence} if recipe.data and recipe.data.licence else {})
