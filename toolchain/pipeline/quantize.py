"""Make the stage of the int8 student."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.data.open import fingerprint as fingerprint_data
from toolchain.pipeline.stage_inputs import data_fields, training_inputs
from toolchain.pipeline.teacher_cache import CacheInputs, find_cache, open_found_cache
from toolchain.progress import Screen
from toolchain.recipe.data import DataSpec
from toolchain.recipe.distill import AFFINITY_LOGIT_SCALE, LossWeights
from toolchain.recipe.evaluate import EvaluateSpec
from toolchain.recipe.quantize import QuantizeSpec
from toolchain.recipe.recipe import Recipe
from toolchain.stage import Stage, StageSpec, run_stage


@dataclass(frozen=True)
class QuantizeInputs:
    """The recipe sections and earlier stages that quantization uses."""

    role: str
    """Role of the float model: student or adopted."""

    spec: QuantizeSpec
    data: DataSpec
    loss_weights: LossWeights
    affinity_logit_scale: float
    reference_compat: bool
    has_more_teachers: bool
    scoring: EvaluateSpec | None
    """The evaluate section, if `quantize.max_drop` is checked on its headline set."""

    seed: int
    student: Stage
    teacher: Stage | None
    cache: CacheInputs | None
    """The teacher's stored features, if they exist."""


def quantize_checkpoint(
    recipe: Recipe, out: Path, made: dict[str, Stage], screen: Screen, *, replace: bool = False
) -> dict[str, Stage]:
    """Make the int8 student, calibrated and fine-tuned with the teacher; return {} if the recipe has none.

    `replace`: also if that replaces one of another recipe that took more than a minute.
    """
    inputs = _quantize_inputs(recipe, out, made)
    if inputs is None:
        return {}
    name = f"{inputs.role}-int8"
    screen.starts(name)
    spec = _stage_spec(inputs, out / name)
    stage = run_stage(spec, lambda folder: _quantize(inputs, folder, screen), replace=replace)
    screen.done(name, stage)
    return {name: stage}


def quantize_spec(recipe: Recipe, out: Path, made: dict[str, Stage]) -> StageSpec | None:
    """Return the stage of the int8 student; None if the recipe has none."""
    inputs = _quantize_inputs(recipe, out, made)
    return None if inputs is None else _stage_spec(inputs, out / f"{inputs.role}-int8")


def _quantize_inputs(recipe: Recipe, out: Path, made: dict[str, Stage]) -> QuantizeInputs | None:
    if recipe.quantize is None or recipe.data is None or not recipe.export.is_quantized:
        return None
    role = "student" if recipe.distill else "adopted"
    teacher = made.get("teacher")
    return QuantizeInputs(
        role,
        recipe.quantize,
        recipe.data,
        recipe.distill.loss_weights if recipe.distill else LossWeights(),
        recipe.distill.affinity_logit_scale if recipe.distill else AFFINITY_LOGIT_SCALE,
        reference_compat=bool(recipe.distill and recipe.distill.reference_compat),
        has_more_teachers=bool(recipe.more_teachers),
        scoring=recipe.evaluate if recipe.quantize.max_drop is not None else None,
        seed=recipe.seed,
        student=made[role],
        teacher=teacher,
        cache=find_cache(training_inputs(recipe), out, teacher) if teacher else None,
    )


def _stage_spec(inputs: QuantizeInputs, path: Path) -> StageSpec:
    fields = {
        "seed": inputs.seed,
        "data": data_fields(inputs.data),
        "quantize": inputs.spec.model_dump(),
        "loss_weights": inputs.loss_weights.key_fields(),
        # features computed during training differ little from those stored in float32
        "teacher_features": inputs.cache.spec.dtype if inputs.cache else "float32",
    }
    if inputs.loss_weights.affinity:
        fields["affinity_logit_scale"] = inputs.affinity_logit_scale
    # These came after the first release: where they change nothing, keys stay as they were.
    if inputs.reference_compat and inputs.loss_weights.gd:
        fields["reference_compat"] = True
    if inputs.has_more_teachers:
        fields["more_teachers"] = True
    if inputs.data.captionless_kind is not None:
        fields["has_captions"] = False
    fingerprints = {"data": fingerprint_data(inputs.data)}
    if inputs.scoring:
        from toolchain.evaluation.open_sets import fingerprint

        fields["headline"] = inputs.scoring.headline
        fingerprints["headline"] = fingerprint(inputs.scoring.headline_set)
    stages = {"student": inputs.student} | ({"teacher": inputs.teacher} if inputs.teacher else {})
    return StageSpec(path, kind="quantize", version=6, fields=fields, fingerprints=fingerprints, inputs=stages)


def _quantize(inputs: QuantizeInputs, folder: Path, screen: Screen) -> dict[str, Any]:
    """Do the work of the stage; return what its manifest records."""
    from toolchain.data.open import training_data
    from toolchain.models.build import load_model
    from toolchain.quantization.quantize_student import Quantization, quantize_student

    size = inputs.spec.batch_size
    data = training_data(inputs.data, seed=inputs.seed, batch_size=size, batch_size_field="quantize.batch_size")
    frozen: Any = None
    if inputs.cache:
        frozen = open_found_cache(inputs.cache)
    elif inputs.teacher:
        frozen = load_model(inputs.teacher.path)
    float_student, headline = load_model(inputs.student.path), None
    if inputs.scoring:
        from toolchain.evaluation.open_sets import open_set
        from toolchain.quantization.sensitivity import headline_criterion

        headline = headline_criterion(float_student, open_set(inputs.scoring.headline_set))
    task = Quantization(
        inputs.spec,
        inputs.loss_weights,
        float_student,
        frozen,
        data,
        inputs.seed,
        affinity_logit_scale=inputs.affinity_logit_scale,
        reference_compat=inputs.reference_compat,
        projects=inputs.has_more_teachers,
        has_captions=inputs.data.captionless_kind is None,
        headline=headline,
    )
    return {"role": inputs.role} | quantize_student(task, folder, screen.progress)
