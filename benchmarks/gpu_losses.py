"""Step 5 of benchmarks/gpu.py: memory and time of the published objectives against the batch, on the device.

The three sides are those of benchmarks/loss_memory.py: ours in blocks, the definitions, and open_clip's loss (task and
CRD alone).  Memory is what a forward and backward pass allocates beyond its features, at its peak.
"""

import gc

import torch
from gpu_results import Step
from gpu_timing import DeviceClock
from loss_memory import SIDES, WIDTH, dense, differentiate, make_features, open_clip_loss, ours

from toolchain.errors import one_line

COMPUTE = {"ours": ours, "dense": dense, "open_clip": open_clip_loss}
_GROWTH = 5.0  # time of twice the batch: four times the similarities, and some reserve


def main(step: Step) -> None:
    device = torch.device(step.device_type)
    torch.backends.cuda.matmul.allow_tf32 = False
    with device:  # the features, and the scales that the sides make, are on the device
        for compute in COMPUTE.values():
            differentiate(compute, 64)  # libraries load, and kernels are chosen
        expected: dict[str, float] = dict.fromkeys(SIDES, 0.0)
        for batch in [64, 128] if step.dry else [1 << k for k in range(12, 19)]:
            for side in [side for side in SIDES if side in expected]:
                if _GROWTH * expected[side] > step.left_s() - 2:
                    step.note(f"{side}: no time for a batch of {batch:,}")
                    del expected[side]
                    continue
                problem = measure(step, side, batch, device, expected)
                free_memory(device)
                if problem:
                    step.record("losses", batch=batch, side=side, problem=problem)
                    del expected[side]  # a larger batch has the same problem


def measure(step: Step, side: str, batch: int, device: torch.device, expected: dict[str, float]) -> str:
    """Record a point; return why there is none, or an empty text."""
    try:
        student, teacher = make_features(batch)
        before = 0
        taken = []
        for _ in range(1 if batch > 16384 else 3):
            for leaf in student:
                leaf.grad = None
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            clock = DeviceClock(device)
            with clock("both passes"):
                COMPUTE[side](student, teacher).backward()  # type: ignore[no-untyped-call]
            taken.append(clock.parts["both passes"])
    except torch.OutOfMemoryError:
        return "out of memory"
    except RuntimeError as error:  # an index beyond what a kernel counts, say
        return one_line(error)
    expected[side] = sum(taken)
    extra_mb = (torch.cuda.max_memory_allocated(device) - before) / 2**20 if device.type == "cuda" else None
    step.record(
        "losses", batch=batch, side=side, extra_mb=extra_mb, seconds=min(taken),
        tflop_per_s=operations(side, batch) / min(taken) / 1e12,
    )  # fmt: skip
    return ""


def operations(side: str, batch: int) -> float:
    """Return the operations of the matrix products that the objectives need, for both directions.

    One product of all features is 2 B^2 D.  The student's similarities and those between the models need a forward and
    two backward products, the teacher's a forward product; open_clip's loss has none between the models.
    """
    products = {"ours": 3 + 3 + 1, "dense": 3 + 3 + 1, "open_clip": 3 + 1}[side]
    return 2.0 * products * 2.0 * batch**2 * WIDTH


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
