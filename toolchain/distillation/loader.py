"""Data loader for training: prepare each batch once for every distinct preprocessing and tokenizer.

A batch is a function of its step, so a loader is a list of steps.  It has no state to save, and the
result does not depend on which worker makes which batch.
"""

import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from toolchain.data.bad_samples import Damage
from toolchain.data.batch import Geometry, TrainingData
from toolchain.distillation.teacher_cache import TeacherCache, TeacherCaches
from toolchain.errors import ClipkdError
from toolchain.models.clip_model import ClipModel


@dataclass(frozen=True)
class PreparedBatch:
    """One rank's rows of a batch, prepared once for every distinct preprocessing and tokenizer."""

    student_pixels: Tensor
    """uint8 [b, 3, H, H]"""

    student_ids: Tensor
    """int64 [b, T]"""

    teacher_pixels: Tensor | None
    teacher_ids: Tensor | None
    captions_b: list[str]
    sample_b: NDArray[np.int64]
    view: int
    damaged: tuple[Damage, ...] = ()
    teacher_features: tuple[Tensor, Tensor] | None = None
    """Cached features of images and texts, [b, E] each, if there is a cache."""

    def to(self, device: torch.device) -> "PreparedBatch":
        return self if device.type == "cpu" else self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PreparedBatch":
        """Return the batch in pinned memory: copying it to a GPU then overlaps with computing."""
        return self._each(Tensor.pin_memory)

    def split(self, parts: int) -> list["PreparedBatch"]:
        """Return the rows in equal parts, in order."""
        size = len(self.student_ids) // parts
        places = [slice(start, start + size) for start in range(0, size * parts, size)]
        return [
            replace(
                self._each(lambda tensor, place=place: tensor[place]),  # type: ignore[misc]  # torch has no better
                captions_b=self.captions_b[place],
                sample_b=self.sample_b[place],
            )
            for place in places
        ]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "PreparedBatch":
        features = self.teacher_features and (change(self.teacher_features[0]), change(self.teacher_features[1]))
        return replace(
            self,
            student_pixels=change(self.student_pixels),
            student_ids=change(self.student_ids),
            teacher_pixels=None if self.teacher_pixels is None else change(self.teacher_pixels),
            teacher_ids=None if self.teacher_ids is None else change(self.teacher_ids),
            teacher_features=features,
        )


@dataclass(frozen=True)
class _Batches(Dataset[PreparedBatch | ClipkdError]):
    """Batches by step, or the error that prevents a batch.

    An error is returned, because torch would wrap one raised in a worker in a traceback of its own.
    """

    data: TrainingData
    rows: slice
    student: tuple[Geometry, Callable[[list[str]], Tensor]]
    teacher: tuple[Geometry, Callable[[list[str]], Tensor]] | None
    cache: TeacherCache | TeacherCaches | None

    def __getitem__(self, step: int) -> PreparedBatch | ClipkdError:
        geometry, tokenize = self.student
        wanted = {geometry} | ({self.teacher[0]} if self.teacher else set())
        try:
            batch = self.data.batch(step, self.rows, sorted(wanted))
            features = self.cache.features(batch.sample_B, batch.pick_B, batch.view) if self.cache else None
        except ClipkdError as error:
            return error
        ids_bT = tokenize(batch.captions_B)
        teacher_pixels = teacher_ids_bT = None
        if self.teacher:
            teacher_pixels = batch.pixels[self.teacher[0]]
            teacher_ids_bT = ids_bT if self.teacher[1] == tokenize else self.teacher[1](batch.captions_B)
        return PreparedBatch(
            student_pixels=batch.pixels[geometry],
            student_ids=ids_bT,
            teacher_pixels=teacher_pixels,
            teacher_ids=teacher_ids_bT,
            captions_b=batch.captions_B,
            sample_b=batch.sample_B,
            view=batch.view,
            damaged=batch.damaged,
            teacher_features=features,
        )


def load_batches(
    data: TrainingData,
    steps: range,
    rows: slice,
    student: ClipModel,
    teacher: ClipModel | TeacherCache | TeacherCaches | None,
    workers: int,
) -> Generator[PreparedBatch, None, None]:
    """Yield one rank's rows of the batches of `steps`, for a student and a teacher, live or cached.

    Close the generator to end the workers: they ignore signals.

    Raises:
        ClipkdError: a sample cannot be read.
    """
    prepare_for_teacher, cache = None, teacher if isinstance(teacher, TeacherCache | TeacherCaches) else None
    if isinstance(teacher, ClipModel):
        tokenize = student.tokenize_trimmed if teacher.tokenizes_like(student) else teacher.tokenize_trimmed
        prepare_for_teacher = teacher.geometry, tokenize
    for model in (student, teacher):
        if isinstance(model, ClipModel):
            model.probe_fast_paths()
    dataset = _Batches(data, rows, (student.geometry, student.tokenize_trimmed), prepare_for_teacher, cache)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=torch.cuda.is_available() and workers > 0,
        worker_init_fn=_ignore_signals,
        # Python 3.14 defaults to a fork server: its workers would get copies of the nets and outlive the run.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    with _hold_signals():
        loaded = iter(loader)  # starts the workers, which inherit the blocked signals
    try:
        for batch in loaded:
            if isinstance(batch, ClipkdError):
                raise batch
            yield batch
    finally:
        del loaded  # ends the workers: an error's traceback would keep them, and they would keep the run from ending


@contextmanager
def _hold_signals() -> Iterator[None]:
    """Delay signals while workers start: a signal would kill a worker that does not ignore it yet."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _ignore_signals(worker: int) -> None:
    """Ignore signals in a worker: Ctrl-C reaches it as well as its rank, and a dead worker would end the run."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
