"""Export every model of a recipe as its own stage, which is complete only after the parity check with PyTorch passes.

Heavy packages are imported inside the work, so that a run whose stages are all complete needs none of them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.device_programs.runner import as_pair
from export.documents import ExportSummary, GraphSummary, PlannedExport
from export.pipeline.origin import describe_origin
from export.pipeline.plan import FAILED, is_adaptable, is_of_the_model, mark_failed, plan_exports, shipped_role
from toolchain.errors import ClipkdError, GateError, UnavailableBackend
from toolchain.filesystem import read_json
from toolchain.pipeline.stage_inputs import require_evaluation
from toolchain.precisions import PRECISIONS
from toolchain.progress import Screen
from toolchain.recipe.model_names import CONFIG, INT8_CONFIG
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
    plan = plan_exports(recipe)
    headline = fingerprint(require_evaluation(recipe).headline_set)
    failures: list[ClipkdError] = []
    # first those that others can be made from: see is_adaptable
    for planned in sorted(plan, key=lambda p: (p.in_runtime.separates_products, not p.uint8_input)):
        if planned.in_precision.is_quantized and planned.checkpoint not in made:
            continue  # `quantize` reported why
        checkpoint = made[planned.checkpoint]
        origin = describe_origin(recipe, out, checkpoint, made.get("teacher"))
        spec = export_spec(planned, recipe, out, checkpoint, headline, origin)
        rounded = planned.in_precision.is_quantized and _has_rounded_outputs(checkpoint.path)
        source = next(
            (exported[e.name] for e in plan if e.name in exported and is_adaptable(e, planned, rounded)), None
        )
        screen.starts(planned.name)
        try:
            work = partial(_export_and_prove, planned, recipe, checkpoint, source, origin, screen)
            exported[planned.name] = run_stage(spec, work)
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
    return {planned.name: exported[planned.name] for planned in plan if planned.name in exported}


def export_spec(
    planned: PlannedExport, recipe: Recipe, out: Path, checkpoint: Stage, headline: str, origin: dict[str, Any]
) -> StageSpec:
    """Return the stage that exports one model; `headline` is the fingerprint of the headline set."""
    return StageSpec(
        out / "exported" / planned.name,
        kind="export",
        version=6,
        fields={
            "runtime": planned.runtime,
            "precision": planned.precision,
            "opset": planned.opset,
            "batch": planned.batch,
            "uint8_input": planned.uint8_input,
            "headline": require_evaluation(recipe).headline,
            "provenance": origin,
        }
        | ({"logit_bias": True} if _has_logit_bias(checkpoint.path) else {}),
        fingerprints={"headline": headline},
        inputs={"checkpoint": checkpoint},
    )


def _has_logit_bias(checkpoint: Path) -> bool:
    """Return True for a sigmoid model; early versions exported these without their bias, and must export them again."""
    config = checkpoint / CONFIG
    return config.is_file() and read_json(config)["model_cfg"].get("init_logit_bias") is not None


def _has_rounded_outputs(checkpoint: Path) -> bool:
    """Return True if outputs of convolutions are rounded in an int8 checkpoint; see output_rounding.py."""
    config = checkpoint / INT8_CONFIG
    return config.is_file() and '"OutputQuantizer"' in config.read_text(encoding="utf-8")


def _export_and_prove(
    planned: PlannedExport,
    recipe: Recipe,
    checkpoint: Stage,
    source: Stage | None,
    origin: dict[str, Any],
    screen: Screen,
    folder: Path,
) -> dict[str, Any]:
    """Export one model into `folder` and check its parity with PyTorch; return its `ExportSummary`.

    The graphs are made from those of `source`, the same model exported for another runtime, if there is one. The model
    gets a model card and, if it is a TensorRT build kit, the files that its device needs.

    Raises:
        GateError: a graph does not compute in its runtime what PyTorch does, or exceeds the range of fp16.
        UnavailableBackend: the runtime does not compute in the precision.
    """
    alone = runtime_that_computes_alone(planned.precision)
    if alone is not None and alone != planned.in_runtime:  # fail now; the parity check would fail minutes later
        instead = f"export {PRECISIONS[planned.precision].instead} for {planned.runtime}"
        raise UnavailableBackend(f"{planned.name}: only {alone.title} computes in {planned.precision}; {instead}")

    from export.graphs.export_onnx import adapt_export
    from export.graphs.model_card import describe_low_sqnr, write_card
    from export.graphs.tensorrt_kit import complete_kit, write_sums
    from export.proof.prove import prove

    (folder / FAILED).unlink(missing_ok=True)  # left by an earlier attempt
    screen.progress("to ONNX", 0, 2)
    if source is None:
        graphs = _trace_and_export(planned, recipe, checkpoint, folder)
    else:
        graphs = adapt_export(source.path, source.manifest["summary"], folder, planned)
    screen.progress("parity", 1, 2)
    # The engines of a kit do not exist yet, so its graphs are checked in a runtime that can run them.
    runtime = planned.in_runtime.graphs_open_in
    proof = prove(folder, runtime=runtime, precision=planned.precision, uint8_input=planned.uint8_input)
    if proof["parity"]["text"]["num_below"]:
        screen.say(f"{planned.name}: {describe_low_sqnr(proof['parity']['text'], planned.precision)}")
    summary: ExportSummary = {**graphs, **proof}
    if planned.in_runtime.is_kit:
        complete_kit(folder, as_pair(read_json(folder / "preprocess.json")["image"]["size"]))
    write_card(folder, f"{recipe.name}: {planned.name}", summary, origin)
    if planned.in_runtime.is_kit:
        write_sums(folder)
    return {**summary}


def _trace_and_export(planned: PlannedExport, recipe: Recipe, checkpoint: Stage, folder: Path) -> GraphSummary:
    """Export a checkpoint from PyTorch into `folder`."""
    from export.graphs.export_onnx import export_onnx
    from toolchain.evaluation.open_sets import open_set
    from toolchain.models.build import load_model

    model = load_model(checkpoint.path)
    frozen = _freeze_towers(planned, checkpoint, model) if planned.in_precision.is_quantized else None
    return export_onnx(model, folder, planned, open_set(require_evaluation(recipe).headline_set), frozen)


def _freeze_towers(planned: PlannedExport, checkpoint: Stage, model: ClipModel) -> FrozenTowers:
    """Return the towers of an int8 checkpoint, rounded as in the graphs of the runtime."""
    from export.graphs.export_onnx import FrozenTowers
    from toolchain.data.glyphs import TEMPLATES
    from toolchain.models.towers import example_pixels
    from toolchain.quantization.checkpoint import load_quantized
    from toolchain.quantization.freeze import freeze, sign_activations

    image, text = load_quantized(checkpoint.path, model)
    if planned.in_runtime.is_kit:
        sign_activations(image, text)
    return FrozenTowers(
        freeze(image, example_pixels(model.net), round_outputs=planned.in_runtime.rounds_outputs),
        freeze(text, model.tokenize(list(TEMPLATES))),
    )
