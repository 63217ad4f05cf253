"""Detect a loss or gradient that became NaN or infinite, and name the objective and the samples that caused it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from toolchain.data.batch import TrainingData
from toolchain.distillation.training_module import TrainingModule
from toolchain.errors import ClipkdError

_NAMED_SAMPLES = 8


def is_finite(row: dict[str, Any], scaler: torch.amp.GradScaler) -> bool:
    """Return False if the step must not be taken; a gradient norm that is not finite becomes None in its row.

    fp16 gradients may overflow: the scaler then skips the step and halves its scale, which is allowed down to 1.
    """
    if not math.isfinite(row["loss"]):
        return False
    if not math.isfinite(row["grad_norm"]):
        row["grad_norm"] = None
        return scaler.is_enabled() and scaler.get_scale() >= 1
    return True


def non_finite_error(
    folder: Path,
    row: dict[str, Any],
    data: TrainingData,
    trainee: TrainingModule,
    differentiate_alone: Callable[[str], None],
    on_any_rank: Callable[[bool], bool],
) -> ClipkdError:
    """Return the error that names the step, the terms and the samples (a collective call).

    `differentiate_alone` adds the gradients of one objective of the step to those of the parameters.
    """
    # decodes the images too: corrupt samples are replaced by others
    sample_B = data.batch(row["step"], slice(None), [trainee.student.geometry]).sample_B
    values = {name: term["unweighted"] for name, term in row["terms"].items()}
    blamed = [name for name, value in values.items() if not math.isfinite(value)]
    what = "loss"
    if not blamed:
        what = "gradient"
        parameters = list(trainee.parameters())
        for name in values:
            for parameter in parameters:
                parameter.grad = None
            differentiate_alone(name)
            gradients = [parameter.grad for parameter in parameters]
            # a rank has only the gradient through its own rows
            if on_any_rank(not all(gradient is None or gradient.isfinite().all() for gradient in gradients)):
                blamed.append(name)
    more = " and others" if len(sample_B) > _NAMED_SAMPLES else ""
    return ClipkdError(
        f"{folder}: the {what} is not finite at step {row['step']}, in {', '.join(blamed) or 'the weighted sum'} "
        f"(terms {values}; samples {sample_B[:_NAMED_SAMPLES].tolist()}{more}). The last checkpoint is intact; "
        "lower distill.lr"
    )
