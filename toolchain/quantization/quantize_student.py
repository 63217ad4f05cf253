"""Quantize the student of a run: calibrate on training samples, fine-tune with the objectives that distilled it."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolchain.data.batch import Batch, Geometry, TrainingData
from toolchain.distillation.features import BatchFeatures, TeacherFeatures
from toolchain.distillation.heads import DistillationHeads
from toolchain.distillation.losses import fd_loss
from toolchain.distillation.objectives import weighted_loss, weights_on_unit_features
from toolchain.distillation.teacher import live_teacher
from toolchain.distillation.teacher_cache import TeacherCache
from toolchain.errors import ClipkdError
from toolchain.models.build import save_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.finite import describe_non_finite
from toolchain.models.towers import ImageTower, TextTower, unit_image_features, unit_text_features
from toolchain.progress import Progress
from toolchain.quantization.quantize import Calibration, FineTuning, FineTuningBatch, quantize
from toolchain.quantization.sensitivity import Criterion, agreement_criterion, revert_worst, score_towers
from toolchain.recipe.distill import AFFINITY_LOGIT_SCALE, LossWeights
from toolchain.recipe.quantize import QuantizeSpec

_SENSITIVITY_SAMPLES = 64  # calibration samples used for each layer's SQNR


@dataclass(frozen=True)
class Quantization:
    """A float student, its teacher and the data: everything that determines the int8 student."""

    spec: QuantizeSpec
    loss_weights: LossWeights
    student: ClipModel
    """The float student."""

    teacher: ClipModel | TeacherCache | None
    """None: the float student serves as the teacher."""

    data: TrainingData
    seed: int
    affinity_logit_scale: float = AFFINITY_LOGIT_SCALE
    reference_compat: bool = False
    projects: bool = False
    """True if learnt projections compared the student with its teacher at equal width too, as with several teachers."""

    has_captions: bool = True
    headline: Criterion | None = None
    """The score that `spec.max_drop` bounds; None: the rate at which the int8 student chooses the teacher's caption."""

    @property
    def steps(self) -> int:
        return (self.spec.steps or 0) if self.spec.method == "qat" else 0


def quantize_student(task: Quantization, folder: Path, progress: Progress) -> dict[str, Any]:
    """Write the int8 checkpoint into `folder`; return what the manifest records.

    Calibration shows each sample twice: as a view, and undistorted as in evaluation.  For glyphs, black on white drives
    activations further than any of 16,000 views.

    The loss is the distillation loss plus `spec.anchor` times the squared distance to the float student's own features.
    Without that anchor, a few steps of a freshly started optimizer undo part of what a long, annealed training reached.
    The teacher runs live or its features are read from a cache; without a teacher, the float student serves as one.

    With `spec.max_drop`, layers return to float until the int8 student meets it.

    Raises:
        GateError: `spec.max_drop` does not hold even with every layer in float.
    """
    started = time.monotonic()
    spec, student, steps = task.spec, task.student, task.steps
    teacher = _open_teacher(task.teacher or copy.deepcopy(student), student.geometry)
    loss_fn = _fine_tuning_loss(task, teacher)
    samples, calibration = _calibration(task, teacher.geometries)
    found: dict[str, Any] = {}

    def revert(image_tower: nn.Module, text_tower: nn.Module) -> None:
        if spec.max_drop is not None:
            towers = {"image": image_tower, "text": text_tower}
            criterion = task.headline or _agreement(task, samples, teacher)
            found["sensitivity"] = _hold_budget(towers, task, calibration, criterion, progress)

    progress("calibrating", 0, steps)
    save_model(student, folder)  # writes configuration and tokenizer; quantize replaces the weights
    fine_tuning = FineTuning(
        _fine_tuning_batches(task, teacher),
        steps,
        spec.lr,
        loss_fn,
        on_step=lambda step, loss: progress("fine-tuning", step + 1, steps, f"loss {loss:.3f}"),
    )
    quantize(student, folder, calibration, fine_tuning, before_saving=revert)
    return {"train_s": round(time.monotonic() - started, 1), "steps": steps} | found


# The teacher ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Teacher:
    """A source of the teacher's unit features of a batch, live or cached."""

    features: Callable[[Batch], tuple[Tensor, Tensor]]
    logit_scale: Tensor
    logit_bias: Tensor | None
    embed_dim: int
    geometries: list[Geometry]
    """The image preparations that teacher and student need."""


def _open_teacher(teacher: ClipModel | TeacherCache, student: Geometry) -> _Teacher:
    if isinstance(teacher, TeacherCache):
        stored = teacher.features
        return _Teacher(
            lambda batch: stored(batch.sample_B, batch.pick_B, batch.view),
            torch.tensor(teacher.logit_scale),
            None if teacher.logit_bias is None else torch.tensor(teacher.logit_bias),
            teacher.embed_dim,
            [student],
        )
    model, live = teacher, live_teacher(teacher, "fp32", torch.device("cpu"))

    @torch.no_grad()
    def compute(batch: Batch) -> tuple[Tensor, Tensor]:
        image_BE = live.image_features(batch.pixels[model.geometry])
        text_BE = live.text_features(model.tokenize_trimmed(batch.captions_B))
        if wrong := describe_non_finite({"image features": image_BE, "text features": text_BE}):
            raise ClipkdError(
                f"teacher {model.name}: {wrong}, of samples {batch.sample_B[:8].tolist()}. {live.non_finite_advice}"
            )
        return image_BE, text_BE

    return _Teacher(compute, live.logit_scale, live.logit_bias, model.embed_dim, list({student, model.geometry}))


# Fine-tuning ----------------------------------------------------------------------------------------------------------


def _fine_tuning_batches(task: Quantization, teacher: _Teacher) -> Iterator[FineTuningBatch]:
    student = task.student
    for step in range(task.steps):
        batch = task.data.batch(step, slice(None), teacher.geometries)
        pixel_values_BCHW = student.normalise(batch.pixels[student.geometry])
        yield FineTuningBatch(pixel_values_BCHW, student.tokenize(batch.captions_B), *teacher.features(batch))


def _fine_tuning_loss(task: Quantization, teacher: _Teacher) -> Callable[[Tensor, Tensor, FineTuningBatch], Tensor]:
    """Return the distillation loss, with the objectives that unit features allow, plus the anchor."""
    student = task.student
    same_space = student.embed_dim == teacher.embed_dim and not task.projects
    objectives = task.loss_weights.model_dump()
    weights = weights_on_unit_features(objectives, same_space=same_space, has_captions=task.has_captions)
    heads = DistillationHeads(student.embed_dim, teacher.embed_dim, weights)
    with torch.no_grad():  # fine-tuning trains the towers alone
        scales = heads.scales(student.logit_scale, student.logit_bias)

    def loss_fn(image_features_BD: Tensor, text_features_BD: Tensor, batch: FineTuningBatch) -> Tensor:
        assert batch.image_target_BD is not None
        assert batch.text_target_BD is not None
        own_BD = batch.image_target_BD, batch.text_target_BD  # the student's own, if it is its own teacher
        teacher_features = TeacherFeatures(*own_BD, teacher.logit_scale, teacher.logit_bias)
        features = BatchFeatures(heads(image_features_BD, text_features_BD, teacher_features), teacher_features)
        loss, _ = weighted_loss(
            features,
            features,
            scales,
            weights,
            divides_by_scales=task.reference_compat,
            affinity_logit_scale=task.affinity_logit_scale,
        )
        if task.teacher is not None:
            with torch.no_grad():
                image_own_BD = unit_image_features(student.net, batch.pixel_values_BCHW)
                own_BD = image_own_BD, unit_text_features(student.net, batch.input_ids_BT)
        distance = fd_loss(image_features_BD, text_features_BD, *own_BD)
        return loss + task.spec.anchor * distance

    return loss_fn


# Calibration and the budget -------------------------------------------------------------------------------------------


def _calibration(task: Quantization, geometries: list[Geometry]) -> tuple[Batch, Calibration]:
    """Return the calibration samples, and the inputs that quantization takes from them.

    Raises:
        ClipkdError: all calibration samples are corrupt.
    """
    spec, student, data = task.spec, task.student, task.data
    sample_B = np.random.default_rng(task.seed).permutation(data.num_samples)[: spec.calibration_samples]
    samples = data.read_view(sample_B, 0, geometries)
    if not len(samples.sample_B):
        raise ClipkdError(
            f"all {len(sample_B)} calibration samples are corrupt; the first: {samples.damaged[0].reason}: "
            f"{samples.damaged[0].where}. Fix the data, or raise quantize.calibration_samples"
        )
    pixels_B3HH = torch.cat([samples.pixels[student.geometry], data.read_unaugmented(sample_B, student.geometry)])
    return samples, Calibration(
        student.normalise(pixels_B3HH),
        student.tokenize(samples.captions_B),
        towers=spec.towers,
        attention=spec.attention,
    )


def _hold_budget(
    towers: dict[str, nn.Module],
    task: Quantization,
    calibration: Calibration,
    criterion: Criterion,
    progress: Progress,
) -> dict[str, Any]:
    """Switch the worst layers back to float until `max_drop` holds; return the findings for the manifest."""
    assert task.spec.max_drop is not None
    net = task.student.net
    float_score = score_towers({"image": ImageTower(net), "text": TextTower(net)}, criterion)
    inputs = {"image": calibration.pixel_values_BCHW, "text": calibration.input_ids_BT}
    few = {name: values[:_SENSITIVITY_SAMPLES] for name, values in inputs.items()}
    return revert_worst(towers, few, criterion, float_score, task.spec.max_drop, progress)


def _agreement(task: Quantization, samples: Batch, teacher: _Teacher) -> Criterion:
    """Return the criterion that compares the caption chosen for each sample's image with the teacher's choice."""
    whose, student = "the float student" if task.teacher is None else "the teacher", task.student
    image_BE, text_BE = teacher.features(samples)
    first_C = {caption: row for row, caption in reversed(list(enumerate(samples.captions_B)))}
    choice_B = (image_BE @ text_BE[list(first_C.values())].T).argmax(-1)
    pixel_values_BCHW = student.normalise(samples.pixels[student.geometry])
    return agreement_criterion(whose, pixel_values_BCHW, student.tokenize(list(first_C)), choice_B)
