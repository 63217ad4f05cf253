"""Batches for the training loop: each made once for every distinct preprocessing and tokenizer, by loader processes.

A batch is a function of its step, so a loader is a list of steps: nothing of it needs saving, and which process makes
which batch changes nothing.

    b rows of one process   T tokens   H image size
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from toolchain import glyphs
from toolchain.data import Geometry, GlyphBatches, TrainingData
from toolchain.models import ClipModel
from toolchain.recipe import DataSpec, GlyphsSpec
from toolchain.shards import ShardBatches


def training_data(spec: DataSpec, *, seed: int, batch_size: int) -> TrainingData:
    """The data a recipe names.

    Raises:
        UsageError: it is not there, or too small for one batch.
    """
    if isinstance(spec, GlyphsSpec):
        return GlyphBatches(glyphs.training_set(), seed, batch_size, spec.views)
    return ShardBatches.open(spec, seed=seed, batch_size=batch_size)


@dataclass(frozen=True)
class Fed:
    """A process's rows of a batch, prepared once for every distinct preprocessing and tokenizer."""

    student_pixels: Tensor
    """uint8 [b, 3, H, H]"""

    student_ids: Tensor
    """int64 [b, T]"""

    teacher_pixels: Tensor | None
    teacher_ids: Tensor | None
    captions_b: list[str]
    sample_b: NDArray[np.int64]
    view: int

    def to(self, device: torch.device) -> "Fed":
        if device.type == "cpu":
            return self
        tensors = (self.student_pixels, self.student_ids, self.teacher_pixels, self.teacher_ids)
        pixels, ids, t_pixels, t_ids = (t if t is None else t.to(device, non_blocking=True) for t in tensors)
        assert pixels is not None
        assert ids is not None
        return Fed(pixels, ids, t_pixels, t_ids, self.captions_b, self.sample_b, self.view)


@dataclass(frozen=True)
class _Steps(Dataset[Fed]):
    """Batches by step, for a loader to make in any process."""

    data: TrainingData
    rows: slice
    student: tuple[Geometry, Callable[[list[str]], Tensor]]
    teacher: tuple[Geometry, Callable[[list[str]], Tensor]] | None

    def __getitem__(self, step: int) -> Fed:
        geometry, tokenize = self.student
        wanted = {geometry} | ({self.teacher[0]} if self.teacher else set())
        batch = self.data.batch(step, self.rows, sorted(wanted))
        ids_bT = tokenize(batch.captions_B)
        teacher_pixels = teacher_ids_bT = None
        if self.teacher:
            teacher_pixels = batch.pixels[self.teacher[0]]
            teacher_ids_bT = ids_bT if self.teacher[1] == tokenize else self.teacher[1](batch.captions_B)
        pixels, captions_b, sample_b = batch.pixels[geometry], batch.captions_B, batch.sample_B
        return Fed(pixels, ids_bT, teacher_pixels, teacher_ids_bT, captions_b, sample_b, batch.view)


def feed(
    data: TrainingData, steps: range, rows: slice, student: ClipModel, teacher: ClipModel | None, workers: int
) -> Iterator[Fed]:
    """A process's rows of the batches of some steps, for a student and, where it runs live, a teacher."""
    taught = None
    if teacher is not None:
        tokenize = student.ids_of if teacher.tokenizes_like(student) else teacher.ids_of
        taught = teacher.geometry, tokenize
    dataset = _Steps(data, rows, (student.geometry, student.ids_of), taught)
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            pin_memory=torch.cuda.is_available() and workers > 0,
        )
    )
