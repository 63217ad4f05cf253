"""Write the training log: train.jsonl, TensorBoard, and the time of each part of a step."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from toolchain.distillation.features import StudentFeatures, TeacherFeatures
from toolchain.distillation.forward_pass import ForwardPass
from toolchain.distributed import Processes
from toolchain.filesystem import replacing

LOG, TENSORBOARD = "train.jsonl", "tensorboard"
_MAX_ROWS = 10_000


def is_logged(step: int, steps: int) -> bool:
    """Return True if a step is logged: every step up to 10,000 in all, else evenly spread ones and the last."""
    return step % max(1, -(-steps // _MAX_ROWS)) == 0 or step == steps - 1


class TrainingLog:
    """The open log of a run; rows from `step` on, left by an interrupted attempt, are dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / LOG
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n") and json.loads(line)["step"] < step:
                    kept.append(line)
        with replacing(path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(folder / TENSORBOARD), purge_step=step)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        for name, value in _curves(row):
            self._tensorboard.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        """Flush all rows to disk; call it before a checkpoint is saved."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._tensorboard.flush()

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._tensorboard.close()


def _curves(row: dict[str, Any]) -> list[tuple[str, float]]:
    curves = []
    for name, value in row.items():
        if name == "terms":
            curves += [(f"{kind}/{term}", number) for term, both in value.items() for kind, number in both.items()]
        elif isinstance(value, dict):
            curves += [(f"{name}/{part}", number) for part, number in value.items()]
        elif name != "step" and value is not None:
            curves.append((name, value))
    return curves


def log_row(
    step: int, lr: float, grad_norm: Tensor, forward_pass: ForwardPass, weights: dict[str, float]
) -> dict[str, Any]:
    """Return a step's row of the log, read from the device in one transfer."""
    student, teacher = forward_pass.everyone
    similarity = {} if teacher is None else _similarity(student, teacher)
    scales = {name: scale for name, scale in forward_pass.scales._asdict().items() if scale is not None}
    tensors = {
        "loss": forward_pass.loss,
        "grad_norm": grad_norm,
        **scales,
        **forward_pass.terms,
        **similarity,
    }
    numbers = dict(zip(tensors, torch.stack([t.detach().float() for t in tensors.values()]).tolist(), strict=True))
    row = {"step": step, "loss": numbers["loss"], "lr": lr, "grad_norm": numbers["grad_norm"]}
    row |= {name: numbers[name] for name in scales}
    terms = {name: numbers[name] for name in forward_pass.terms}
    row["terms"] = {name: {"unweighted": value, "weighted": weights[name] * value} for name, value in terms.items()}
    if similarity:
        row["similarity"] = {name: numbers[name] for name in similarity}
    return row


def _similarity(student: StudentFeatures, teacher: TeacherFeatures) -> dict[str, Tensor]:
    """Return mean cosines of student to teacher features in the teacher's width; empty if no head projects them.

    Of several teachers, it is the mean over all.
    """
    image_BE, text_BE = student.image_BE, student.text_BE
    if image_BE is None or text_BE is None:
        if teacher.widths or student.image_BD.shape[-1] != teacher.image_BE.shape[-1]:
            return {}
        image_BE, text_BE = student.image_BD, student.text_BD
    image, text = (image_BE * teacher.image_BE).sum(-1).mean(), (text_BE * teacher.text_BE).sum(-1).mean()
    count = max(1, len(teacher.widths))
    return {"image": image / count, "text": text / count}


class StepClock:
    """Seconds of a step and of its parts; on a GPU the execution time, not the launch time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parts: dict[str, float] = {}
        self._events: dict[str, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        self._started = time.monotonic()

    def restart(self) -> None:
        self._parts, self._events, self._started = {}, {}, time.monotonic()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.monotonic()
        if self._device.type == "cuda" and part != "data":
            events = _event(), _event()
            events[0].record()
            yield
            events[1].record()
            self._events[part] = events
        else:
            yield
        self._parts[part] = time.monotonic() - started

    def shares(self, batch_size: int) -> dict[str, float]:
        """Return a row's timings; call it after the step's numbers have been read from the device."""
        for part, (begin, end) in self._events.items():
            self._parts[part] = begin.elapsed_time(end) / 1e3
        seconds = time.monotonic() - self._started
        shares = {f"{part}_fraction": round(spent / seconds, 4) for part, spent in self._parts.items()}
        return {"images_per_s": round(batch_size / seconds, 1)} | shares


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped


@contextmanager
def open_log(folder: Path, step: int, processes: Processes) -> Iterator[Any]:
    """Yield the log on rank 0 and None on the others."""
    if not processes.leads:
        yield None
        return
    with TrainingLog(folder, step) as log:
        yield log
