"""Compute a step's gradients: batch -> features of student and teacher -> objectives -> one weighted sum -> gradients.

With `distill.accumulate: k`, a rank's rows pass the student in k parts, and the memory for activations is that of one
part.  The loss compares all rows with each other, so it is not a sum over parts.  As in GradCache (arXiv:2101.06983),

1. all parts pass the student without gradients, which gives the features of all rows;
2. the loss of these features, and its gradient in them, are computed;
3. each part passes the student again, with the same dropout, and backpropagates its rows of that gradient.

The result is the gradient of the whole batch.  Batch norms are the exception: their statistics are those of a part.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from toolchain.distillation.features import BatchFeatures, Scales, StudentFeatures, TeacherFeatures, gather_features
from toolchain.distillation.loader import PreparedBatch
from toolchain.distillation.objectives import OBJECTIVES, weighted_loss
from toolchain.distillation.teacher import DTYPES
from toolchain.distillation.training_module import TrainingModule
from toolchain.distributed import Processes
from toolchain.models.onednn import on_onednn
from toolchain.models.tf32 import float32_products
from toolchain.recipe.distill import DistillSpec, LossWeights
from toolchain.recipe.section import Precision


class ForwardPass(NamedTuple):
    """The result of one step's forward pass, over the batch of all ranks."""

    loss: Tensor
    """The weighted sum, with the value of the whole batch and the gradient of the rank's rows as anchors."""

    terms: dict[str, Tensor]
    """Unweighted terms without gradient, of the objectives whose weight is not zero."""

    scales: Scales
    own: BatchFeatures
    """The rank's rows.  With several parts, the student's features here and `scales` are leaves: the graph of the loss
    ends at them, and `Forward.backward` continues from their gradients."""

    everyone: BatchFeatures
    """The rows of all ranks."""


class Part(NamedTuple):
    """Rows of a rank that pass the student together."""

    number: int
    """Index of the part, from 0."""

    batch: PreparedBatch
    teacher: TeacherFeatures | None


@dataclass(frozen=True)
class Forward:
    """The forward and backward pass of a training, with everything that stays the same from step to step."""

    trainee: TrainingModule
    module: nn.Module
    """The trainee itself, or the wrapper that averages its gradients over the ranks."""

    spec: DistillSpec
    processes: Processes
    seed: int

    def only(self, objective: str) -> "Forward":
        """Return these passes for one objective alone, with weight 1, and without averaging gradients over ranks."""
        weights = LossWeights(**dict.fromkeys(OBJECTIVES, 0.0) | {objective: 1.0})
        return replace(self, module=self.trainee, spec=self.spec.model_copy(update={"loss_weights": weights}))

    def run(self, batch: PreparedBatch, teacher_features: TeacherFeatures | None, step: int) -> ForwardPass:
        """Return the losses of a batch, given one rank's rows of it (a collective call)."""
        parts = self._split(batch, teacher_features)
        if len(parts) == 1:
            rows, scales = self.pass_student(self.module, parts[0], step)
        else:
            with torch.no_grad(), keep_buffers(self.trainee):
                passed = [self.pass_student(self.trainee, part, step) for part in parts]
            rows, scales = _as_leaves([features for features, _ in passed], passed[0][1])
        own = BatchFeatures(rows, teacher_features)
        everyone = gather_features(own, self.processes.gather)
        with float32_products(tf32=False):  # of the losses, which compute their gradients here too
            loss, terms = weighted_loss(
                own,
                everyone,
                scales,
                self.spec.loss_weights.model_dump(),
                self.processes,
                memory_mb=self.spec.loss_memory_mb,
                divides_by_scales=self.spec.reference_compat,
                affinity_logit_scale=self.spec.affinity_logit_scale,
            )
        return ForwardPass(loss, terms, scales, own, everyone)

    def backward(
        self, forward_pass: ForwardPass, batch: PreparedBatch, step: int, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """Add the gradients of the loss, times the scale of `scaler` if given, to those of the parameters.

        `forward_pass` is the result of `run` for the same batch and step (a collective call).
        """
        loss = forward_pass.loss if scaler is None else scaler.scale(forward_pass.loss)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward untyped
        if self.spec.parts == 1:
            return
        parts = self._split(batch, forward_pass.own.teacher)
        for part in parts:
            is_last = part is parts[-1]
            with nullcontext() if is_last else self._without_averaging():
                rows, scales = self.pass_student(self.module, part, step)
                size = len(part.batch.student_ids)
                place = slice(part.number * size, (part.number + 1) * size)
                products = _products(rows, forward_pass.own.student, place)
                if is_last:  # once: the scales are the same in every part
                    products += _products(scales, forward_pass.scales, slice(None))
                torch.stack(products).sum().backward()  # type: ignore[no-untyped-call]

    def _split(self, batch: PreparedBatch, teacher: TeacherFeatures | None) -> list[Part]:
        """Return the parts of the rank's rows, with their rows of the teacher's features."""
        batches = batch.split(self.spec.parts)
        if teacher is None:
            return [Part(number, part, None) for number, part in enumerate(batches)]
        image_bE, text_bE = teacher.image_BE.chunk(len(batches)), teacher.text_BE.chunk(len(batches))
        return [
            Part(number, part, teacher._replace(image_BE=image_bE[number], text_BE=text_bE[number]))
            for number, part in enumerate(batches)
        ]

    def pass_student(self, module: nn.Module, part: Part, step: int) -> tuple[StudentFeatures, Scales]:
        """Return the student's features of a part, and the scales.  A second call has the same dropout and masks."""
        spec, device = self.spec, self.processes.device
        torch.manual_seed(_dropout_seed(self.seed, step, self.processes.rank, part.number))
        masks = self.trainee.masks(self.seed, part.batch.sample_b, step)
        with _autocast(spec.precision, device), on_onednn(device, compiled=spec.compile):
            pixel_values = self.trainee.student.normalise(part.batch.student_pixels)
            found: tuple[StudentFeatures, Scales] = module(pixel_values, part.batch.student_ids, part.teacher, *masks)
        return found

    def _without_averaging(self) -> AbstractContextManager[Any]:
        """Return a context that adds gradients on the rank only; the last part, outside it, averages them."""
        no_sync: Any = getattr(self.module, "no_sync", nullcontext)
        context: AbstractContextManager[Any] = no_sync()
        return context


def _as_leaves(parts: list[StudentFeatures], scales: Scales) -> tuple[StudentFeatures, Scales]:
    """Return the concatenated features of all parts, and the scales, as leaves.

    Fields that share a tensor, such as `image_BD` and `image_BE` of equal widths, share a leaf.
    """
    found: dict[int, Tensor] = {}
    for column in zip(*parts, strict=True):
        if column[0] is not None and id(column[0]) not in found:
            found[id(column[0])] = torch.cat(column).requires_grad_()
    features = StudentFeatures._make(None if x is None else found[id(x)] for x in parts[0])
    return features, Scales._make(None if x is None else x.detach().requires_grad_() for x in scales)


def _products(values: Any, leaves: Any, place: slice) -> list[Tensor]:
    """Return for each tensor the sum of tensor * gradient of its leaf, whose gradient in the tensor is the leaf's.

    `place` are the rows of the leaves that `values` has.
    """
    distinct = {id(leaf): (value, leaf) for value, leaf in zip(values, leaves, strict=True) if leaf is not None}
    return [
        (value * (leaf.grad if leaf.ndim == 0 else leaf.grad[place])).sum()
        for value, leaf in distinct.values()
        if leaf.grad is not None
    ]


@contextmanager
def keep_buffers(module: nn.Module) -> Iterator[None]:
    """Restore the buffers after the block, so that batch norms see each part once."""
    before = [buffer.clone() for buffer in module.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in zip(module.buffers(), before, strict=True):
            buffer.copy_(value)


def _autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, DTYPES[precision]) if precision != "fp32" else nullcontext()


def _dropout_seed(seed: int, step: int, rank: int, part: int) -> int:
    """Return the seed of a part's dropout; part 0 has the seed of a batch that is not split."""
    numbers = [seed, step, rank, *([part] if part else [])]
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
