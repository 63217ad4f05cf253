"""What a training run says of itself: train.jsonl, one row a step, and the same curves for TensorBoard.

A row, all of it a function of the recipe and the data but the last three fields, which are times:

    step, loss, lr, grad_norm, logit_scale, cross_logit_scale, fusion_logit_scale
    terms        {objective: {unweighted, weighted}}
    similarity   {image, text}: mean cosine of the student's features to the teacher's (how CLIP-KD explains its gain)
    accuracy     {top1, top5, n}: of the headline set, at the steps that evaluate
    images_per_s, data_fraction, teacher_fraction
"""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

LOG, TENSORBOARD = "train.jsonl", "tensorboard"
_MAX_ROWS = 10_000


def logs(step: int, steps: int) -> bool:
    """Whether a step of so many has a row: every one up to 10,000 steps, evenly spread ones beyond, and the last."""
    return step % max(1, -(-steps // _MAX_ROWS)) == 0 or step == steps - 1


class TrainingLog:
    """Open for the length of a run; rows at or beyond `step`, left by an interrupted attempt, are dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / LOG
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n") and json.loads(line)["step"] < step:
                    kept.append(line)
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._curves = SummaryWriter(str(folder / TENSORBOARD), purge_step=step)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        for name, value in _curves_of(row):
            self._curves.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        """Before a checkpoint is saved: a checkpoint's rows are on disk when it is."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._curves.flush()

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._curves.close()


def _curves_of(row: dict[str, Any]) -> list[tuple[str, float]]:
    curves = []
    for name, value in row.items():
        if name == "terms":
            curves += [(f"{kind}/{term}", number) for term, both in value.items() for kind, number in both.items()]
        elif isinstance(value, dict):
            curves += [(f"{name}/{part}", number) for part, number in value.items()]
        elif name != "step" and value is not None:
            curves.append((name, value))
    return curves
