"""Skip steps whose loss or gradient is NaN or infinite, and name the objective and the samples that caused it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolchain.data.batch import TrainingData
from toolchain.distillation.forward_pass import Forward, ForwardPass
from toolchain.distillation.loader import PreparedBatch
from toolchain.distillation.teacher import non_finite_advice
from toolchain.errors import ClipkdError
from toolchain.recipe.distill import DistillSpec

_NAMED_SAMPLES = 8


def step_if_finite(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loss: Tensor,
    grad_norm: Tensor,
    failed: Tensor,
) -> None:
    """Take the optimizer's step if the loss and the gradients are finite.

    The device decides, so the host need not wait for it, and may already start the next step.  Therefore `failed`, a
    scalar that is True once a step was not finite, makes the optimizer skip all later steps too.  The weights remain
    those of the failed step, and it can be computed again for `non_finite_error`.

    fp16 gradients may overflow: the step is skipped and the scaler halves its scale, which is allowed down to 1.
    """
    is_wrong = is_fatal = ~(loss.isfinite() & grad_norm.isfinite())
    if scaler.is_enabled():
        scale: Tensor = scaler.scale(torch.ones_like(loss))
        is_fatal = ~loss.isfinite() | is_wrong & (scale < 1)
    failed |= is_fatal
    optimizer.found_inf = (failed | is_wrong).float()  # type: ignore[attr-defined]  # GradScaler tells it so, too
    optimizer.step()
    scaler.update()


def non_finite_error(
    folder: Path,
    row: dict[str, Any],
    data: TrainingData,
    forward: Forward,
    forward_pass: ForwardPass,
    batch: PreparedBatch,
) -> ClipkdError:
    """Return the error that names the step, the features or the terms, and the samples (a collective call).

    `row` has the numbers of the step, and `forward_pass` and `batch` are those of the step.  The gradients of the
    parameters are lost.
    """
    step, spec, trainee = row["step"], forward.spec, forward.trainee
    # decodes the images too: corrupt samples are replaced by others
    sample_B = data.batch(step, slice(None), [trainee.student.geometry]).sample_B
    if (teacher := forward_pass.everyone.teacher) is not None:
        features = {"image": teacher.image_BE, "text": teacher.text_BE}
        if blamed := _describe_features("teacher", features, sample_B):
            advice = non_finite_advice(spec.teacher_precision == "fp32")
            return ClipkdError(f"{folder}: the loss is not finite at step {step}, because {blamed}. {advice}")
    values = {name: term["unweighted"] for name, term in row["terms"].items()}
    blamed_terms = [name for name, value in values.items() if not math.isfinite(value)]
    what = "loss"
    if math.isfinite(row["loss"]):
        what, blamed_terms = "gradient", _find_terms(forward, forward_pass, batch, step)
    more = " and others" if len(sample_B) > _NAMED_SAMPLES else ""
    advice = _advise(spec, step, is_sum=not blamed_terms)
    student = forward_pass.everyone.student
    features = {"image": student.image_BD, "text": student.text_BD}
    if blamed := _describe_features("student", features, sample_B):
        advice = f"The cause: {blamed}. {advice}"
    return ClipkdError(
        f"{folder}: the {what} is not finite at step {step}, in {', '.join(blamed_terms) or 'the weighted sum'} "
        f"(terms {values}; samples {sample_B[:_NAMED_SAMPLES].tolist()}{more}). {advice}"
    )


def _find_terms(forward: Forward, done: ForwardPass, batch: PreparedBatch, step: int) -> list[str]:
    """Return the terms whose gradient is not finite, each computed again alone."""
    blamed = []
    for name in done.terms:
        forward.trainee.zero_grad(set_to_none=True)
        alone = forward.only(name)
        alone.backward(alone.run(batch, done.own.teacher, step), batch, step)
        gradients = [parameter.grad for parameter in forward.trainee.parameters() if parameter.grad is not None]
        # a rank has only the gradient through its own rows
        if forward.processes.any(not all(gradient.isfinite().all() for gradient in gradients)):
            blamed.append(name)
    return blamed


def _describe_features(whose: str, features: dict[str, Tensor], sample_B: NDArray[np.int64]) -> str | None:
    """Return which features of a model are not finite, and of which samples; None if all are finite."""
    for part, features_BD in features.items():
        wrong_B = ~features_BD.detach().isfinite().all(-1)
        if wrong_B.any():
            wrong = sample_B[wrong_B.cpu().numpy()]
            more = " and others" if len(wrong) > _NAMED_SAMPLES else ""
            return (
                f"the {whose}'s {part} features of {len(wrong)} of {len(sample_B)} samples are not finite (samples "
                f"{wrong[:_NAMED_SAMPLES].tolist()}{more})"
            )
    return None


def _advise(spec: DistillSpec, step: int, *, is_sum: bool) -> str:
    """Return what to do; the learning rate is a cause only once it has changed the weights."""
    if is_sum:
        return "Lower distill.loss_weights: each term is finite, and their weighted sum is not"
    if step:
        return "The last checkpoint is intact; lower distill.lr"
    if spec.precision != "fp32":
        return (
            f"No step was taken yet, so distill.lr is not the cause. Set distill.precision: fp32 (now {spec.precision})"
        )
    return (
        "No step was taken yet, so distill.lr is not the cause. Check the weights that the student starts from and "
        "these samples"
    )
