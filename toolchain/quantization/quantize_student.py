"""The int8 student of a run: calibrated on training samples, fine-tuned with the objectives that distilled it.

B batch   D student width   E guide's width
"""

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolchain.data.batch import Batch as Shown
from toolchain.data.batch import Geometry, TrainingData
from toolchain.distillation.losses import fd_loss
from toolchain.distillation.objectives import DistillationHeads, TeacherFeatures, loss_terms, weights_on_unit_features
from toolchain.distillation.teacher import live_teacher
from toolchain.distillation.teacher_cache import TeacherCache
from toolchain.errors import ClipkdError
from toolchain.models.build import save_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.towers import ImageTower, TextTower, unit_image_features, unit_text_features
from toolchain.progress import Progress
from toolchain.quantization.quantize import Batch, quantize
from toolchain.quantization.sensitivity import Probe, agreement_probe, revert_worst, score_of
from toolchain.recipe.distill import LossWeights
from toolchain.recipe.quantize import QuantizeSpec

_SENSITIVITY_SAMPLES = 64  # of calibration, for each layer's SQNR


def quantize_student(
    spec: QuantizeSpec,
    loss_weights: LossWeights,
    student: ClipModel,
    teacher: ClipModel | TeacherCache | None,
    data: TrainingData,
    folder: Path,
    progress: Progress,
    *,
    seed: int,
    headline: Probe | None = None,
) -> dict[str, Any]:
    """Write the int8 checkpoint into `folder`; returns what the manifest should say.

    Calibration shows each of its samples twice, as a view and undistorted, as evaluation will: of glyphs, black on
    white drives activations further than any view of 16,000 does.

    The loss is the distillation's plus `spec.anchor` times the squared distance to the float student's own features.
    Without that anchor, a few steps of an optimizer that starts anew undo some of what a long, annealed training
    reached.  The teacher runs live, or its features are looked up; without one, the float student teaches.

    With `spec.max_drop`, layers go back to float until the int8 student holds it, on `headline`, or without one in how
    often it chooses the teacher's caption among those of the calibration samples.

    Raises:
        GateError: `spec.max_drop` does not hold even with every layer in float.
    """
    started = time.monotonic()
    steps = (spec.steps or 0) if spec.method == "qat" else 0
    guide = teacher or copy.deepcopy(student)
    taught, logit_scale_of_guide, geometries = _taught_by(guide, student.geometry)
    weights = weights_on_unit_features(loss_weights.model_dump(), same_width=student.embed_dim == guide.embed_dim)
    heads = DistillationHeads(student.embed_dim, guide.embed_dim, weights)

    def batches() -> Iterator[Batch]:
        for step in range(steps):
            batch = data.batch(step, slice(None), geometries)
            pixel_values_BCHW = student.normalise(batch.pixels[student.geometry])
            yield pixel_values_BCHW, student.tokenize(batch.captions_B), *taught(batch)

    logit_scale = student.logit_scale.detach()

    def loss_of(image_features_BD: Tensor, text_features_BD: Tensor, batch: Batch) -> Tensor:
        assert batch[2] is not None
        assert batch[3] is not None
        guided = TeacherFeatures(batch[2], batch[3], logit_scale_of_guide)
        features = heads(image_features_BD, text_features_BD, guided)
        terms = loss_terms(features, logit_scale, guided, heads, weights)
        own_BD = batch[2], batch[3]  # of the student that teaches itself
        if teacher is not None:
            with torch.no_grad():
                own_BD = unit_image_features(student.net, batch[0]), unit_text_features(student.net, batch[1])
        distance = fd_loss(image_features_BD, text_features_BD, *own_BD)
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum() + spec.anchor * distance

    sample_B = np.random.default_rng(seed).permutation(data.num_samples)[: spec.calibration_samples]
    shown = data.view_of(sample_B, 0, geometries)
    if not len(shown.sample_B):
        raise ClipkdError(
            f"all of {len(sample_B)} samples to calibrate with are damaged; the first: {shown.damaged[0].reason}: "
            f"{shown.damaged[0].where}. Mend the data, or raise quantize.calibration_samples"
        )
    pixels_B3HH = torch.cat([shown.pixels[student.geometry], data.undistorted(sample_B, student.geometry)])
    calibration = {"image": student.normalise(pixels_B3HH), "text": student.tokenize(shown.captions_B)}
    found: dict[str, Any] = {}

    def before_saving(image_tower: nn.Module, text_tower: nn.Module) -> None:
        if spec.max_drop is None:
            return
        probe = headline or _agreement(
            student, "the float student" if teacher is None else "the teacher", shown, *taught(shown)
        )
        float_score = score_of({"image": ImageTower(student.net), "text": TextTower(student.net)}, probe)
        found["sensitivity"] = revert_worst(
            {"image": image_tower, "text": text_tower},
            {name: inputs[:_SENSITIVITY_SAMPLES] for name, inputs in calibration.items()},
            probe,
            float_score,
            spec.max_drop,
            progress,
        )

    progress("calibrating", 0, steps)
    save_model(student, folder)  # configuration and tokenizer; quantize replaces the weights
    quantize(
        student,
        batches(),
        (calibration["image"], calibration["text"]),
        steps=steps,
        lr=spec.lr,
        folder=folder,
        towers=spec.towers,
        attention=spec.attention,
        loss_of=loss_of,
        before_saving=before_saving,
        on_step=lambda step, loss: progress("fine-tuning", step + 1, steps, f"loss {loss:.3f}"),
    )
    return {"train_s": round(time.monotonic() - started, 1), "steps": steps} | found


def _taught_by(
    guide: ClipModel | TeacherCache, of_student: Geometry
) -> tuple[Callable[[Shown], tuple[Tensor, Tensor]], Tensor, list[Geometry]]:
    """What gives the guide's unit features [B, E] of a batch, its multiplier, and the geometries the batch needs."""
    if isinstance(guide, TeacherCache):
        looked_up = guide.features
        return (
            lambda batch: looked_up(batch.sample_B, batch.pick_B, batch.view),
            torch.tensor(guide.logit_scale),
            [of_student],
        )
    model, live = guide, live_teacher(guide, "fp32", torch.device("cpu"))

    @torch.no_grad()
    def computed(batch: Shown) -> tuple[Tensor, Tensor]:
        image_BE = live.image_features(batch.pixels[model.geometry])
        return image_BE, live.text_features(model.ids_of(batch.captions_B))

    return computed, live.logit_scale, list({of_student, model.geometry})


def _agreement(student: ClipModel, whose: str, shown: Shown, image_BE: Tensor, text_BE: Tensor) -> Probe:
    """Which of the samples' captions the teacher, by `whose` name, chooses for each of their pictures."""
    first_C = {caption: row for row, caption in reversed(list(enumerate(shown.captions_B)))}
    choice_B = (image_BE @ text_BE[list(first_C.values())].T).argmax(-1)
    pixel_values_BCHW = student.normalise(shown.pixels[student.geometry])
    return agreement_probe(whose, pixel_values_BCHW, student.tokenize(list(first_C)), choice_B)
