"""Estimate the memory of a training step before the first one, and choose the number of parts that fits.

With `distill.accumulate`, a rank's samples pass the student in several parts.  A step then holds

- what the student keeps for its backward pass, for the samples of one part;
- the gradients of the parameters, and their state in the optimizer;
- the features of the batch, and their gradients;
- the similarities of a block of samples with the batch (blocks.py).
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from toolchain.distillation.blocks import BLOCK_ARRAYS
from toolchain.distillation.features import TeacherFeatures
from toolchain.distillation.forward_pass import Forward, Part, keep_buffers
from toolchain.distillation.loader import PreparedBatch
from toolchain.errors import UsageError
from toolchain.models.towers import example_pixels

_PROBED = 2, 4
"""Numbers of samples in the two passes that measure the student; a batch norm needs at least two samples."""

_TEMPORARY = 3
"""Temporary arrays of a backward pass that exist at once.  Each is as large as the largest array that is kept."""

_FEATURES = 4
"""Arrays of each kind of feature: values and gradients, of the rank and of all ranks, all counted as [B, D]."""

_MAX_SHARE = 0.9  # of the free memory
_CGROUP = Path("/sys/fs/cgroup")


class StepMemory(NamedTuple):
    """The memory of a step in bytes, in addition to what is allocated before it."""

    of_sample: float
    """The student's need for each sample of a part: arrays kept for the backward pass, and temporary ones."""

    other: float
    """The rest, which does not depend on the part: gradients, optimizer, images, features and similarities."""

    def of_part(self, samples: int) -> float:
        """Return the memory of a step whose parts have this many samples."""
        return self.of_sample * samples + self.other


def fit_parts(forward: Forward, optimizer: torch.optim.Optimizer, num_rows: int, teacher_width: int | None) -> int:
    """Return the number of parts for a rank's `num_rows` samples (a collective call).

    It is the recipe's `accumulate` if that fits the free memory of every rank; for `auto`, the smallest that fits.  If
    the free memory is unknown, nothing is estimated, and `auto` means 1.

    Raises:
        UsageError: a step does not fit.  The message names the smallest number of parts that fits, if there is one.
    """
    spec, processes = forward.spec, forward.processes
    free = free_bytes(processes.device)
    if free is None:
        return 1 if spec.accumulate == "auto" else spec.accumulate
    # every rank takes as many parts as the one that needs most
    by_rank = processes.gather_objects((estimate_step(forward, optimizer, num_rows, teacher_width), free))
    fitting = (
        parts
        for parts in divisors(num_rows)
        if all(needed.of_part(num_rows // parts) <= _MAX_SHARE * free for needed, free in by_rank)
    )
    smallest = next(fitting, 0)  # 0: none fits
    if smallest and (spec.accumulate == "auto" or spec.accumulate >= smallest):
        return smallest if spec.accumulate == "auto" else spec.accumulate
    asked = num_rows if spec.accumulate == "auto" else num_rows // spec.accumulate
    if smallest:
        advice = f"Set distill.accumulate: {smallest}, the smallest that fits"
    else:
        advice = (
            f"No distill.accumulate makes it fit: lower distill.batch_size ({spec.batch_size}) or "
            f"distill.loss_memory_mb ({spec.loss_memory_mb:g})"
        )
    rank, (needed, free) = max(enumerate(by_rank), key=lambda each: each[1][0].of_part(asked) - each[1][1])
    on_rank = f" on rank {rank}" if processes.size > 1 else ""
    total, in_student, other = (x / 1e9 for x in (needed.of_part(asked), needed.of_sample * asked, needed.other))
    raise UsageError(
        f"distill: a step needs about {total:.1f} GB ({in_student:.1f} GB for {asked} samples in the student, "
        f"{other:.1f} GB for all else), and {free / 1e9:.1f} GB are free{on_rank}. {advice}"
    )


def estimate_step(
    forward: Forward, optimizer: torch.optim.Optimizer, num_rows: int, teacher_width: int | None
) -> StepMemory:
    """Estimate the memory of a step from two forward passes of a few samples; they leave the trainee as it was.

    A student that is compiled is not compiled for them.  It then keeps fewer arrays than estimated.
    """
    spec, student = forward.spec, forward.trainee.student
    few, more = (_kept_bytes(forward, samples, teacher_width) for samples in _PROBED)
    # the difference is free of what does not depend on the samples, such as weights cast to 16 bits
    kept, largest = ((b - a) / (_PROBED[1] - _PROBED[0]) for a, b in zip(few, more, strict=True))
    trained = sum(p.numel() * p.element_size() for p in forward.trainee.parameters() if p.requires_grad)
    of_parameters = trained * (1 if optimizer.state else 3)  # gradients, and AdamW's two moments
    features = _FEATURES * 2 * spec.batch_size * 4 * (student.embed_dim + (teacher_width or 0))
    pixels = 2 * num_rows * math.prod(example_pixels(student.net).shape[1:])  # a batch, and the next one
    similarities = min(spec.loss_memory_mb * 2**20, 4 * BLOCK_ARRAYS * num_rows * spec.batch_size)
    return StepMemory(kept + _TEMPORARY * largest, of_parameters + features + pixels + similarities)


def _kept_bytes(forward: Forward, samples: int, teacher_width: int | None) -> tuple[int, int]:
    """Return the bytes that a forward pass keeps for its backward pass, and those of the largest array in them."""
    trainee, student = forward.trainee, forward.trainee.student
    device = forward.processes.device
    pixels = torch.zeros(samples, *example_pixels(student.net).shape[1:], dtype=torch.uint8, device=device)
    ids = student.tokenize(["a " * 999] * samples).to(device)  # the longest caption
    batch = PreparedBatch(pixels, ids, None, None, [""] * samples, np.arange(samples), 0)
    teacher = None
    if teacher_width is not None:
        unit_BE = nn.functional.normalize(torch.ones(samples, teacher_width, device=device), dim=-1)
        teacher = TeacherFeatures(unit_BE, unit_BE, torch.ones((), device=device))
    own = {x.untyped_storage().data_ptr() for x in (*trainee.parameters(), *trainee.buffers())}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    eager = torch.compiler.set_stance("force_eager")  # compiling takes minutes
    with eager, keep_buffers(trainee), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = forward.pass_student(trainee, Part(0, batch, teacher), 0)
    del result  # the arrays live until here, so no two have the same address
    return sum(kept.values()), max(kept.values(), default=0)


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that this process can still allocate on its device, in bytes; None if it is unknown.

    On a CPU it is the machine's available memory, or what the control group still allows if that is less, divided by
    the number of ranks on this machine.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    found = [_read_available(Path("/proc/meminfo")), _read_cgroup(_CGROUP)]
    known = [value for value in found if value is not None]
    return min(known) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if known else None


def _read_available(path: Path) -> int | None:
    """Return the available memory of the machine, from Linux's /proc/meminfo."""
    try:
        lines = dict(line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def _read_cgroup(folder: Path) -> int | None:
    """Return the bytes that a control group (version 2) still allows; its file cache counts as free."""
    try:
        limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(limit) - int(used) + int(stat["inactive_file"])
    except (OSError, KeyError, ValueError):  # no such group, or "max": no limit
        return None


def divisors(count: int) -> list[int]:
    """Return the numbers of equal parts into which `count` samples can be split, ascending."""
    return [parts for parts in range(1, count + 1) if count % parts == 0]
