"""Compute a step's forward pass: batch -> features of student and teacher -> objectives -> one weighted sum."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from toolchain.distillation.loader import PreparedBatch
from toolchain.distillation.objectives import (
    OBJECTIVES,
    BatchFeatures,
    StudentFeatures,
    TeacherFeatures,
    gather_features,
    weighted_loss,
)
from toolchain.distillation.teacher import DTYPES
from toolchain.distillation.training_module import TrainingModule
from toolchain.distributed import Processes
from toolchain.models.onednn import on_onednn
from toolchain.recipe.distill import DistillSpec, LossWeights
from toolchain.recipe.section import Precision


class ForwardPass(NamedTuple):
    """The result of one step's forward pass, over the batch of all ranks."""

    loss: Tensor
    """The weighted sum, with the value of the whole batch and the gradient of the rank's rows as anchors."""

    terms: dict[str, Tensor]
    """Unweighted terms without gradient, of the objectives whose weight is not zero."""

    scales: dict[str, Tensor]
    student: StudentFeatures
    teacher: TeacherFeatures | None


@dataclass(frozen=True)
class Forward:
    """The constants of a run's forward passes."""

    trainee: TrainingModule
    module: nn.Module
    """The trainee itself, or the wrapper that averages its gradients over the ranks."""

    spec: DistillSpec
    processes: Processes
    seed: int

    def only(self, objective: str) -> "Forward":
        """Return the same passes with one objective, of weight 1."""
        weights = LossWeights(**dict.fromkeys(OBJECTIVES, 0.0) | {objective: 1.0})
        return replace(self, module=self.trainee, spec=self.spec.model_copy(update={"loss_weights": weights}))

    def run(self, batch: PreparedBatch, teacher_features: TeacherFeatures | None, step: int) -> ForwardPass:
        """Return the loss of one rank's rows of a batch, computed over the rows of all ranks (a collective call)."""
        spec, device, student = self.spec, self.processes.device, self.trainee.student
        torch.manual_seed(_step_seed(self.seed, step, self.processes.rank))  # for dropout, if a tower has any
        masks = self.trainee.masks(self.seed, batch.sample_b, step)
        with _autocast(spec.precision, device), on_onednn(device, compiled=spec.compile):
            pixel_values = student.normalise(batch.student_pixels)
            rows, scales = self.module(pixel_values, batch.student_ids, teacher_features, *masks)
        own = BatchFeatures(rows, teacher_features)
        everyone = gather_features(own, self.processes.gather)
        loss, terms = weighted_loss(
            own, everyone, scales["logit_scale"], self.trainee.heads, spec.loss_weights.model_dump(), self.processes
        )
        return ForwardPass(loss, terms, scales, *everyone)


def _autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, DTYPES[precision]) if precision != "fp32" else nullcontext()


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
