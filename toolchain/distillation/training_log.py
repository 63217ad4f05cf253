"""Write the training log: train.jsonl, TensorBoard, and the time of each part of a step.

The numbers of a step are computed on the device.  They are read while it computes the next step (`UnreadRow`), so
neither waits for the other.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

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


@dataclass(frozen=True)
class UnreadRow:
    """A step's row of the log; its numbers are still being computed, or are on their way from the device."""

    step: int
    lr: float
    names: Sequence[tuple[str, str]]
    """Group and name of each number: of the step itself, of the terms, or of the similarities."""

    numbers: Tensor
    """On the host, and valid once the step has ended."""

    weights: Mapping[str, float]
    times: "StepTimes"

    def read(self) -> tuple[dict[str, Any], bool]:
        """Wait for the end of the step; return its row, and True if the run failed at this step or before.

        A gradient norm that is not finite is None in the row.
        """
        self.times.wait()
        found: dict[str, dict[str, float]] = {}
        for (group, name), number in zip(self.names, self.numbers.tolist(), strict=True):
            found.setdefault(group, {})[name] = number
        loss, grad_norm, failed = (found["step"].pop(name) for name in ("loss", "grad_norm", "failed"))
        row: dict[str, Any] = {"step": self.step, "loss": loss, "lr": self.lr}
        row |= {"grad_norm": grad_norm if math.isfinite(grad_norm) else None, **found["step"]}
        terms = found["terms"].items()
        row["terms"] = {name: {"unweighted": value, "weighted": self.weights[name] * value} for name, value in terms}
        row |= {group: found[group] for group in ("similarity",) if group in found}
        return row | self.times.shares(), bool(failed)


def start_row(
    step: int,
    lr: float,
    grad_norm: Tensor,
    forward_pass: ForwardPass,
    weights: Mapping[str, float],
    failed: Tensor,
    clock: "StepClock",
) -> UnreadRow:
    """Return the row of a step that was just started, and stop its clock; nothing waits for the device.

    Copying the numbers to the host is a part of the step.  A copy from a GPU goes to pinned memory.
    """
    student, teacher = forward_pass.everyone
    scales = {name: scale for name, scale in forward_pass.scales._asdict().items() if scale is not None}
    groups = {
        "step": {"loss": forward_pass.loss, "grad_norm": grad_norm, "failed": failed, **scales},
        "terms": forward_pass.terms,
        "similarity": {} if teacher is None else _similarity(student, teacher),
    }
    tensors = {(group, name): tensor for group, named in groups.items() for name, tensor in named.items()}
    numbers = torch.stack([tensor.detach().float() for tensor in tensors.values()])
    return UnreadRow(step, lr, list(tensors), numbers.to("cpu", non_blocking=True), weights, clock.stop())


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


_Moment = float | torch.cuda.Event


class StepTimes(NamedTuple):
    """Beginning and end of a step and of its parts: in seconds, or events of a GPU that it may still have to reach."""

    batch_size: int
    step: tuple[_Moment, _Moment]
    parts: dict[str, tuple[_Moment, _Moment]]

    def wait(self) -> None:
        """Wait for the end of the step."""
        if isinstance(self.step[1], torch.cuda.Event):
            self.step[1].synchronize()

    def shares(self) -> dict[str, float]:
        """Return a row's timings, once the step has ended."""
        seconds = _seconds(*self.step)
        parts = {f"{part}_fraction": round(_seconds(*times) / seconds, 4) for part, times in self.parts.items()}
        return {"images_per_s": round(self.batch_size / seconds, 1)} | parts


class StepClock:
    """Time a step and its parts, on a GPU by events in its stream.

    A GPU reaches an event when it has done all work before it.  Time in which the host loads data and the GPU still
    computes an earlier step is therefore not counted; time in which the GPU waits for the data is.
    """

    def __init__(self, device: torch.device, batch_size: int) -> None:
        self._device, self._batch_size = device, batch_size
        self.restart()

    def restart(self) -> None:
        self._parts: dict[str, tuple[_Moment, _Moment]] = {}
        self._started = self._now()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = self._now()
        yield
        self._parts[part] = started, self._now()

    def stop(self) -> StepTimes:
        """Return the times since the last restart."""
        return StepTimes(self._batch_size, (self._started, self._now()), self._parts)

    def _now(self) -> _Moment:
        if self._device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        event.record()
        return event


def _seconds(start: _Moment, end: _Moment) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1e3
    assert isinstance(start, float)
    assert isinstance(end, float)
    return end - start


@contextmanager
def open_log(folder: Path, step: int, processes: Processes) -> Iterator[Any]:
    """Yield the log on rank 0 and None on the others."""
    if not processes.leads:
        yield None
        return
    with TrainingLog(folder, step) as log:
        yield log
