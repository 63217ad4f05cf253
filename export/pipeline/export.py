"""The stages from the checkpoints on: exported models, each held against its PyTorch model, and what they measure.

Heavy packages are imported inside the work, so that a run whose stages are all complete needs none of them.
"""

from pathlib import Path
from typing import Any

from export.pipeline.plan import FAILED, exports, is_of_the_model, mark_failed, shipped_role
from toolchain.errors import ClipkdError, GateError, UnavailableBackend
from toolchain.pipeline.stage_inputs import evaluated
from toolchain.progress import Screen
from toolchain.recipe.export import is_quantized
from toolchain.recipe.recipe import Recipe
from toolchain.stage import Stage, StageSpec, run_stage


def export_models(recipe: Recipe, out: Path, made: dict[str, Stage], screen: Screen) -> dict[str, Stage]:
    """ONNX graphs of every model, each held against its PyTorch model before it counts as made."""
    from toolchain.data import glyphs
    from toolchain.evaluation.open_sets import fingerprint, open_set

    exported = {}
    accuracy = evaluated(recipe)
    headline = fingerprint(accuracy.headline_set)
    failures: list[ClipkdError] = []
    for name, role, runtime, precision in exports(recipe):
        is_kit = runtime == "tensorrt"
        if is_quantized(precision) and f"{role}-int8" not in made:
            continue  # `quantize` said why
        checkpoint = made[f"{role}-int8" if is_quantized(precision) else role]
        has_uint8_input = recipe.export.uint8_input and role == shipped_role(recipe) and not is_kit

        def work(
            folder: Path,
            name: str = name,
            role: str = role,
            runtime: str = runtime,
            precision: str = precision,
            checkpoint: Stage = checkpoint,
            is_kit: bool = is_kit,
            has_uint8_input: bool = has_uint8_input,
        ) -> dict[str, Any]:
            if precision == "int8-bf16" and runtime != "openvino":  # its proof would say so, minutes later
                raise UnavailableBackend(f"{name}: OpenVINO alone computes in int8-bf16; export int8 for {runtime}")

            from export.graphs.export_onnx import export_onnx
            from export.graphs.model_card import write_card
            from export.proof.prove import prove
            from toolchain.models.build import load_model
            from toolchain.models.towers import example_pixels
            from toolchain.quantization.checkpoint import load_quantized
            from toolchain.quantization.freeze import freeze, sign_activations

            (folder / FAILED).unlink(missing_ok=True)  # of an earlier attempt
            model = load_model(checkpoint.path)
            image_tower, text_tower = None, None
            if is_quantized(precision):
                image, text = load_quantized(checkpoint.path, model)
                if is_kit:
                    sign_activations(image, text)
                image_tower = freeze(image, example_pixels(model.net))
                text_tower = freeze(text, model.tokenize(list(glyphs.TEMPLATES)))
            screen.progress("to ONNX", 0, 2)
            summary = export_onnx(
                model,
                folder,
                role=role,
                precision=precision,
                headline=open_set(accuracy.headline_set),
                runtime=runtime,
                opset=recipe.export.opset,
                batch=recipe.export.batch,
                uint8_input=has_uint8_input,
                image_tower=image_tower,
                text_tower=text_tower,
            )
            screen.progress("parity", 1, 2)
            # A kit's graphs are proven where they can be run: its engines do not exist yet.
            proven_in = "onnxruntime" if is_kit else runtime
            summary |= prove(folder, runtime=proven_in, precision=precision, uint8_input=has_uint8_input)
            if is_kit:
                from export.graphs.tensorrt_kit import complete_kit, write_sums

                summary["runtime"] = "tensorrt"
                height, width = example_pixels(model.net).shape[-2:]
                complete_kit(folder, (height, width))
            write_card(folder, f"{recipe.name}: {name}", summary, _provenance(recipe, checkpoint))
            if is_kit:
                write_sums(folder)
            return summary

        screen.starts(name)
        path = out / "exported" / name
        try:
            exported[name] = run_stage(
                StageSpec(
                    path,
                    kind="export",
                    version=5,
                    fields={
                        "runtime": runtime,
                        "precision": precision,
                        "opset": recipe.export.opset,
                        "batch": recipe.export.batch,
                        "uint8_input": has_uint8_input,
                        "headline": accuracy.headline,
                        "provenance": _provenance(recipe, checkpoint),
                    },
                    fingerprints={"headline": headline},
                    inputs={"checkpoint": checkpoint},
                ),
                work,
            )
        except ClipkdError as error:  # the others are still worth having
            weighed = recipe.export.auto is not None and role == shipped_role(recipe)
            if not (is_of_the_model(error) if weighed else isinstance(error, GateError | UnavailableBackend)):
                raise
            mark_failed(path, error)
            if not weighed:
                failures.append(error)
            screen.line(name, f"failed: {error}")
            continue
        screen.done(name, exported[name])
    if failures:
        kind = GateError if any(isinstance(error, GateError) for error in failures) else UnavailableBackend
        raise kind("\n".join(map(str, failures)))
    return exported


def _provenance(recipe: Recipe, checkpoint: Stage) -> dict[str, Any]:
    """What a model card says of where a model came from: names and settings of the recipe, the checkpoint's hash.

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
