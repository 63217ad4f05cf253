"""The int8 student of a run: calibrated on training samples, fine-tuned with the objectives that distilled it.

B batch   D student width   E guide's width
"""

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolchain.data import Batch as Shown
from toolchain.data import Geometry, TrainingData
from toolchain.errors import ClipkdError
from toolchain.losses import fd_loss
from toolchain.models import ClipModel, save_model, unit_image_features, unit_text_features
from toolchain.objectives import DistillationHeads, TeacherBatch, loss_terms
from toolchain.quantize import Batch, ImageTower, TextTower, quantize
from toolchain.recipe import LossWeights, QuantizeSpec
from toolchain.sensitivity import Probe, agreement_probe, revert_worst, score_of
from toolchain.teacher import LiveTeacher, Progress, live_teacher

_SENSITIVITY_SAMPLES = 64  # of calibration, for each layer's SQNR


def quantize_student(
    spec: QuantizeSpec,
    loss_weights: LossWeights,
    student: ClipModel,
    teacher: ClipModel | None,
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
    reached.  The teacher runs live: a few dozen batches do not pay for stored features.  Without one, the float student
    teaches.

    With `spec.max_drop`, layers go back to float until the int8 student holds it, on `headline`, or without one in how
    often it chooses the teacher's caption among those of the calibration samples.

    Raises:
        GateError: `spec.max_drop` does not hold even with every layer in float.
    """
    started = time.monotonic()
    steps = (spec.steps or 0) if spec.method == "qat" else 0
    guide = teacher or student
    live = live_teacher(copy.deepcopy(guide) if guide is student else guide, "fp32", torch.device("cpu"))
    geometries = list({student.geometry, guide.geometry})
    # A fresh fusion layer would teach nothing, and the graphs have no slot for a mask: MFD goes on without one.
    weights = loss_weights.model_dump()
    weights |= {"fd": weights["fd"] + weights.get("mfd", 0.0), "mfd": 0.0, "afd": 0.0}
    if student.embed_dim != guide.embed_dim:  # the towers end in unit features, learnt projections start from raw ones
        weights |= dict.fromkeys(("fd", "gd", "icl", "cross_kd"), 0.0)
    if not any(weights.values()):
        weights["task"] = 1.0  # all that distilled this student needs its trained heads
    heads = DistillationHeads(student.embed_dim, guide.embed_dim, weights)

    def batches() -> Iterator[Batch]:
        for step in range(steps):
            batch = data.batch(step, slice(None), geometries)
            with torch.no_grad():
                image_BE = live.image_features(batch.pixels[guide.geometry])
                text_BE = live.text_features(guide.ids_of(batch.captions_B))
            yield (
                student.normalise(batch.pixels[student.geometry]),
                student.tokenize(batch.captions_B),
                image_BE,
                text_BE,
            )

    logit_scale = student.logit_scale.detach()

    def loss_of(image_features_BD: Tensor, text_features_BD: Tensor, batch: Batch) -> Tensor:
        assert batch[2] is not None
        assert batch[3] is not None
        taught = batch[2], batch[3]
        guided = TeacherBatch(*taught, live.logit_scale)
        features = heads(image_features_BD, text_features_BD, guided)
        terms = loss_terms(features, logit_scale, guided, heads, weights)
        own_BD = taught  # of the student that teaches itself
        if guide is not student:
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
            student, "the float student" if teacher is None else "the teacher", live, shown, guide.geometry
        )
        float_score = score_of({"image": ImageTower(student.net), "text": TextTower(student.net)}, probe)
        found["sensitivity"] = revert_worst(
            {"image": image_tower, "text": text_tower},
            {name: inputs[:_SENSITIVITY_SAMPLES] for name, inputs in calibration.items()},
            probe,
            float_score,
            spec.max_drop,
            lambda done, total: progress("layers", done, total),
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
        loss_of=loss_of,
        before_saving=before_saving,
        on_step=lambda step, loss: progress("fine-tuning", step + 1, steps, f"loss {loss:.3f}"),
    )
    return {"train_s": round(time.monotonic() - started, 1), "steps": steps} | found


@torch.no_grad()
def _agreement(student: ClipModel, whose: str, live: LiveTeacher, shown: Shown, geometry: Geometry) -> Probe:
    """Which of the samples' captions the teacher, by `whose` name, chooses for each of their pictures."""
    captions = list(dict.fromkeys(shown.captions_B))
    text_CE = live.text_features(live.model.ids_of(captions))
    choice_B = (live.image_features(shown.pixels[geometry]) @ text_CE.T).argmax(-1)
    pixel_values_BCHW = student.normalise(shown.pixels[student.geometry])
    return agreement_probe(whose, pixel_values_BCHW, student.tokenize(captions), choice_B)
