"""The stage that makes the int8 student."""

from pathlib import Path
from typing import Any

from toolchain.data.open import fingerprint as fingerprint_data
from toolchain.pipeline.stage_inputs import data_fields
from toolchain.pipeline.teacher_cache import cached_or_live_teacher, stored_dtype
from toolchain.progress import Screen
from toolchain.recipe.distill import LossWeights
from toolchain.recipe.recipe import Recipe
from toolchain.stage import Stage, StageSpec, run_stage


def quantize_checkpoint(recipe: Recipe, out: Path, made: dict[str, Stage], screen: Screen) -> dict[str, Stage]:
    """The int8 student, calibrated and fine-tuned against the teacher."""
    spec = recipe.quantize
    if spec is None or not recipe.export.is_quantized:
        return {}
    role = "student" if recipe.distill else "adopted"
    name, student, teacher = f"{role}-int8", made[role], made.get("teacher")
    data_spec = recipe.data
    assert data_spec is not None
    weights = recipe.distill.loss_weights if recipe.distill else LossWeights()
    judged: dict[str, str] = {}
    if spec.max_drop is not None and recipe.evaluate is not None:
        from toolchain.evaluation.open_sets import fingerprint

        judged["headline"] = fingerprint(recipe.evaluate.headline_set)

    def work(folder: Path) -> dict[str, Any]:
        from toolchain.data.open import training_data
        from toolchain.models.build import load_model
        from toolchain.quantization.quantize_student import quantize_student

        data = training_data(data_spec, seed=recipe.seed, batch_size=spec.batch_size)
        frozen = cached_or_live_teacher(recipe, out, teacher) if teacher else None
        float_student, probe = load_model(student.path), None
        if judged and recipe.evaluate is not None:
            from toolchain.evaluation.open_sets import open_set
            from toolchain.quantization.sensitivity import headline_probe

            probe = headline_probe(float_student, open_set(recipe.evaluate.headline_set))
        quantized = quantize_student(
            spec, weights, float_student, frozen, data, folder, screen.progress, seed=recipe.seed, headline=probe
        )
        return {"role": role} | quantized

    screen.starts(name)
    stage = run_stage(
        StageSpec(
            out / name,
            kind="quantize",
            version=6,
            fields={
                "seed": recipe.seed,
                "data": data_fields(data_spec),
                "quantize": spec.model_dump(),
                "loss_weights": weights.model_dump(),
                "teacher_features": stored_dtype(recipe, out)
                or "float32",  # computed anew, they are nearly the same bits
            }
            | ({"headline": recipe.evaluate.headline} if judged and recipe.evaluate else {}),
            fingerprints={"data": fingerprint_data(data_spec)} | judged,
            inputs={"student": student} | ({"teacher": teacher} if teacher else {}),
        ),
        work,
    )
    screen.done(name, stage)
    return {name: stage}
