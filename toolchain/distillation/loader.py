"""Data loader for training: prepare each batch once for every distinct preprocessing and tokenizer.

A batch is a function of its step, and so are its rows.  A loader is therefore a list of steps, has no state to save,
and its result does not depend on which worker makes which rows.

Workers make parts of about `PART_ROWS` rows, in the order of the steps.  A thread puts the parts of the next batch
together while the current one is used, so the first batch takes all workers, and memory is bounded (`loader_bytes`):
per worker two parts in shared memory and at most three more while it makes one, and two whole batches in this process
(three in pinned memory, for a GPU).  Nothing is kept in /dev/shm.

Example: batches of 4,096 images of 224 px have 617 MB, parts of them 10 MB.  With 15 workers that is at most
15 * 5 * 10 MB + 2 * 617 MB = 2.0 GB.
"""

import atexit
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolchain.data.bad_samples import Damage
from toolchain.data.batch import Geometry, TrainingData
from toolchain.distillation.free_memory import free_bytes
from toolchain.distillation.loader_workers import SLOTS, Made, Workers, round_up
from toolchain.distillation.teacher_cache import TeacherCache, TeacherCaches
from toolchain.errors import UsageError
from toolchain.models.clip_model import ClipModel

PART_ROWS = 64
"""Fewest rows that a worker makes at a time, unless a batch has fewer; each part opens its shards once more."""

_COPIES_IN_MAKING = 3  # of the part that a worker makes: a mixture joins the rows of its sources and sorts them


def copy_to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return the host's tensor on a device; the host does not wait for a GPU that copies pinned memory without gaps."""
    return (x.contiguous().pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


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
        return self if device.type == "cpu" else self._each(lambda tensor: copy_to_device(tensor, device))

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
        """Return the batch with every tensor changed, once if student and teacher share it."""
        changed: dict[int, Tensor] = {}

        def change_once(tensor: Tensor) -> Tensor:
            if id(tensor) not in changed:
                changed[id(tensor)] = change(tensor)
            return changed[id(tensor)]

        features = self.teacher_features and (
            change_once(self.teacher_features[0]),
            change_once(self.teacher_features[1]),
        )
        return replace(
            self,
            student_pixels=change_once(self.student_pixels),
            student_ids=change_once(self.student_ids),
            teacher_pixels=None if self.teacher_pixels is None else change_once(self.teacher_pixels),
            teacher_ids=None if self.teacher_ids is None else change_once(self.teacher_ids),
            teacher_features=features,
        )


class _Labels(NamedTuple):
    """All of a part of a batch but its arrays."""

    captions_b: list[str]
    sample_b: NDArray[np.int64]
    view: int
    damaged: tuple[Damage, ...]


class _Inputs(NamedTuple):
    """The preprocessing and tokenizer that prepare a model's inputs."""

    geometry: Geometry
    tokenize: Callable[[list[str]], Tensor]


class _Part(NamedTuple):
    """Rows of a step's batch."""

    step: int
    rows: slice


@dataclass(frozen=True)
class _Reader:
    """Make parts of batches, each distinct array once."""

    data: TrainingData
    student: _Inputs
    teacher: _Inputs | None
    """A live teacher, None if there is none."""

    cache: TeacherCache | TeacherCaches | None

    @property
    def geometries(self) -> list[Geometry]:
        return sorted({self.student.geometry} | ({self.teacher.geometry} if self.teacher else set()))

    @property
    def has_other_ids(self) -> bool:
        """True if the teacher's tokenizer differs from the student's."""
        return self.teacher is not None and self.teacher.tokenize != self.student.tokenize

    def read(self, part: _Part) -> Made[_Labels]:
        """Return the arrays and labels of a part.

        Raises:
            ClipkdError: a sample cannot be read.
        """
        batch = self.data.batch(part.step, part.rows, self.geometries)
        features = self.cache.features(batch.sample_B, batch.pick_B, batch.view) if self.cache else ()
        arrays = {_name_pixels(geometry): pixels for geometry, pixels in batch.pixels.items()}
        arrays[_STUDENT_IDS] = self.student.tokenize(batch.captions_B)
        if self.teacher and self.has_other_ids:
            arrays[_TEACHER_IDS] = self.teacher.tokenize(batch.captions_B)
        arrays |= dict(zip(_FEATURES, features, strict=False))
        return arrays, _Labels(batch.captions_B, batch.sample_B, batch.view, batch.damaged)

    def count_bytes(self, rows: int) -> int:
        """Return the bytes of the arrays of so many rows."""
        arrays = [3 * geometry.size**2 * rows for geometry in self.geometries]
        for inputs in (self.student, self.teacher if self.has_other_ids else None):
            if inputs is not None:
                arrays.append(inputs.tokenize([""]).nbytes * rows)
        if self.cache is not None:
            arrays += [self.cache.embed_dim * 4 * rows] * len(_FEATURES)
        return sum(map(round_up, arrays))


_STUDENT_IDS, _TEACHER_IDS, _FEATURES = "student ids", "teacher ids", ("image features", "text features")


def _name_pixels(geometry: Geometry) -> str:
    return f"pixels {geometry.size} {geometry.interpolation}"


def loader_bytes(rows: int, row_bytes: int, workers: int, *, pinned: bool = False) -> int:
    """Return the most memory that a loader of batches of `rows` rows takes, in all its processes together.

    It counts the arrays of batches and parts, not the interpreters, the index of the data or an image while it is
    decoded.  `row_bytes` are those of all arrays of a row: 3 * H * W for pixels, and those of ids and cached features.
    Without workers, a batch is made in this process while the one before it is used.
    """
    if not workers:
        return (1 + _COPIES_IN_MAKING) * rows * row_bytes
    part: int = max(part.stop - part.start for part in split_rows(slice(0, rows)))
    batches = 3 * 2 if pinned else 2  # one more is copied to the GPU, and torch pins powers of two
    return (batches * rows + workers * (SLOTS + _COPIES_IN_MAKING) * part) * row_bytes


def split_rows(rows: slice) -> list[slice]:
    """Return consecutive parts of at least `PART_ROWS` rows, or one part if there are fewer."""
    count = rows.stop - rows.start
    parts = max(1, count // PART_ROWS)
    ends = [rows.start + count * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(ends)]


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
        UsageError: the batches need more memory than is free.
        ClipkdError: a sample cannot be read, or a worker was killed.
    """
    for model in (student, teacher):
        if isinstance(model, ClipModel):
            model.probe_fast_paths()
    reader = _reader(data, student, teacher)
    prepare = partial(_prepare, reader, student, teacher if isinstance(teacher, ClipModel) else None)
    if not workers:
        for step in steps:
            yield prepare(*reader.read(_Part(step, rows)))
        return
    if not steps:
        return
    rows = slice(*rows.indices(data.batch_size)[:2])
    count, parts, pinned = rows.stop - rows.start, split_rows(rows), torch.cuda.is_available()
    _require_memory(count, reader.count_bytes(1), workers, pinned=pinned)
    tasks = (_Part(step, part) for step in steps for part in parts)
    largest = max(part.stop - part.start for part in parts)
    pool = Workers(reader.read, min(workers, len(steps) * len(parts)), reader.count_bytes(largest))
    made = pool.make(tasks)
    batches = (_join_parts(islice(made, len(parts)), count, pinned=pinned) for _ in steps)
    with closing(_run_ahead(batches, pool.end)) as joined:
        for batch in joined:
            yield prepare(*batch)
            del batch


def _reader(
    data: TrainingData, student: ClipModel, teacher: ClipModel | TeacherCache | TeacherCaches | None
) -> _Reader:
    taught = None
    if isinstance(teacher, ClipModel):
        taught = _Inputs(teacher.geometry, (student if teacher.tokenizes_like(student) else teacher).tokenize)
    cache = teacher if isinstance(teacher, TeacherCache | TeacherCaches) else None
    return _Reader(data, _Inputs(student.geometry, student.tokenize), taught, cache)


def _join_parts(parts: Iterable[Made[_Labels]], rows: int, *, pinned: bool) -> Made[_Labels]:
    """Return the batch of `rows` rows that the parts are, copied: their memory is used again for the next parts."""
    joined: dict[str, Tensor] = {}
    found: list[_Labels] = []
    start = 0
    for arrays, labels in parts:
        stop = start + len(labels.captions_b)
        for name, array in arrays.items():
            if name not in joined:
                joined[name] = torch.empty(rows, *array.shape[1:], dtype=array.dtype, pin_memory=pinned)
            joined[name].numpy()[start:stop] = array.numpy()  # torch would copy with threads that training needs
        found.append(labels)
        start = stop
    captions = [caption for labels in found for caption in labels.captions_b]
    damaged = tuple(damage for labels in found for damage in labels.damaged)
    return joined, _Labels(captions, np.concatenate([labels.sample_b for labels in found]), found[0].view, damaged)


def _prepare(
    reader: _Reader, student: ClipModel, teacher: ClipModel | None, arrays: Mapping[str, Tensor], labels: _Labels
) -> PreparedBatch:
    """Return a batch from its arrays; the lengths of the texts are decided here, for all rows together."""
    pinned = arrays[_STUDENT_IDS].is_pinned()
    teacher_pixels = teacher_ids = None
    student_ids = _pin(student.trim(arrays[_STUDENT_IDS]), pinned=pinned)
    if teacher is not None:
        teacher_pixels = arrays[_name_pixels(teacher.geometry)]
        teacher_ids = student_ids
        if reader.has_other_ids:
            teacher_ids = _pin(teacher.trim(arrays[_TEACHER_IDS]), pinned=pinned)
    image_name, text_name = _FEATURES
    return PreparedBatch(
        student_pixels=arrays[_name_pixels(student.geometry)],
        student_ids=student_ids,
        teacher_pixels=teacher_pixels,
        teacher_ids=teacher_ids,
        captions_b=labels.captions_b,
        sample_b=labels.sample_b,
        view=labels.view,
        damaged=tuple(sorted(labels.damaged)),
        teacher_features=(arrays[image_name], arrays[text_name]) if reader.cache else None,
    )


def _pin(ids_bL: Tensor, *, pinned: bool) -> Tensor:
    """Return trimmed ids, without gaps if they are pinned: only then is a copy to a GPU asynchronous."""
    return ids_bL.contiguous().pin_memory() if pinned else ids_bL


def _run_ahead(
    batches: Iterator[Made[_Labels]], end_workers: Callable[[], None]
) -> Generator[Made[_Labels], None, None]:
    """Yield batches; a thread puts the next one together, and no more, while one is used."""
    ready: queue.SimpleQueue[Made[_Labels] | Exception | None] = queue.SimpleQueue()
    wanted, ended = threading.Semaphore(), threading.Event()

    def assemble() -> None:
        try:
            while wanted.acquire() and not ended.is_set():
                batch = next(batches, None)
                ready.put(batch)
                if batch is None:
                    break
                del batch  # or it would live as long as the next one
        except Exception as error:
            ready.put(error)

    def stop() -> None:
        ended.set()
        wanted.release()
        end_workers()  # a thread that waits for one gets an error
        thread.join()

    thread = threading.Thread(target=assemble, name="data loader", daemon=True)
    thread.start()
    atexit.register(
        stop
    )  # later, threads do not run any more, and a generator that nobody closed would wait for its own
    try:
        while (batch := ready.get()) is not None:
            if isinstance(batch, Exception):
                raise batch
            wanted.release()
            yield batch
            del batch
    finally:
        atexit.unregister(stop)
        stop()


def _require_memory(rows: int, row_bytes: int, workers: int, *, pinned: bool) -> None:
    """Check, before the first batch, that the loader's memory is free.

    Raises:
        UsageError: it is not.
    """
    needed, free = loader_bytes(rows, row_bytes, workers, pinned=pinned), free_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        fitting = [n for n in range(1, workers) if loader_bytes(rows, row_bytes, n, pinned=pinned) <= free]
        advice = f"Use at most --workers {fitting[-1]}, or lower" if fitting else "Lower"
        raise UsageError(
            f"data loader: {workers} worker(s) and batches of {rows:,} samples of {row_bytes:,} bytes take up to "
            f"{needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free for this rank. {advice} "
            "distill.batch_size"
        )
