"""Step 3 of benchmarks/gpu.py: the training step, ViT-B/16 teaching ViT-T/16 at 224 px, ours and a straightforward one.

The straightforward step is that of benchmarks/train_step.py: the equations, all 77 tokens, one read of the loss per
step; the teacher and the student in float32, with TF32 off and on, or under autocast to bf16.  Ours is the step of
clipkd's training loop in bf16, with the teacher live and with float32 features from a cache.  Each is measured as it is
("eager") and with the blocks of its towers compiled; the time to compile is not in the step.

All sides use the same batches, from pinned memory, and are interleaved a few steps at a time, which events time.  A
speed-up is the median over turns of the ratio to the straightforward step in bf16.  The MFU counts the operations of
matrix products, convolutions and attention that a side does in a step, and divides by the measured rate of a bf16
product.
"""

import copy
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gpu_results import Step
from gpu_timing import DeviceClock, gemm_tflops
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from train_step import make_batch, straightforward

from toolchain.distillation.forward_pass import Forward
from toolchain.distillation.loader import PreparedBatch
from toolchain.distillation.teacher import CachedTeacher, live_teacher
from toolchain.distillation.training_module import TrainingModule, clip_gradients, make_optimizer
from toolchain.distributed import Processes
from toolchain.errors import one_line
from toolchain.models.build import build_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.text_trimming import trim_tokens
from toolchain.models.towers import compile_towers, without_attention_fast_path
from toolchain.recipe.distill import DistillSpec
from toolchain.recipe.model import ModelSpec

REFERENCE = "straightforward bf16"
SIDES = (
    "straightforward fp32",
    "straightforward fp32, TF32",
    REFERENCE,
    "ours, live teacher",
    "ours, cached teacher",
)
COMPILE_FIRST = ("ours, cached teacher", "ours, live teacher", REFERENCE, "straightforward fp32, TF32")
SEARCHED = (REFERENCE, "ours, live teacher", "ours, cached teacher", "straightforward fp32, TF32")
PARTS = {
    "copy": ("copy",),
    "teacher": ("teacher", "teacher image", "teacher text"),
    "student": ("student", "student image", "student text"),
    "loss": ("losses",),
    "backward": ("backward",),
    "optimizer": ("optimizer",),
}
"""Columns of the table, and the parts of both kinds of steps that each adds up; ours clips gradients in `optimizer`."""

MAX_GRAPHS = 64
"""Compilations of one function.  Torch's own limit, 8, is below what sides in several precisions need, and a function
beyond it silently runs as it is."""


@dataclass(frozen=True)
class Models:
    teacher: ClipModel
    student: ClipModel
    image_size: int


@dataclass(frozen=True)
class HostBatch:
    """A batch as a loader makes it, in pinned memory on a machine with a GPU."""

    pixels: Tensor
    ids_BT: Tensor
    ids_BL: Tensor
    """Trimmed to the longest caption."""

    features: tuple[Tensor, Tensor]
    """The teacher's, as a cache has them."""


@dataclass
class Side:
    """One way to take a training step, with models and an optimizer of its own."""

    name: str
    compiled: bool
    take: Callable[[HostBatch], DeviceClock]
    """Take one step; its parts are read later, because reading them waits for the device."""

    model_bytes: int = 0
    warmup_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int = 0


def main(step: Step) -> None:
    device = torch.device(step.device_type)
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    if step.dry:
        torch.compiler.set_stance("force_eager")  # compiling takes minutes on a CPU
    peak = gemm_tflops(device, 256 if step.dry else 8192, torch.bfloat16)
    step.note(f"the MFU is relative to {peak:.1f} TFLOP/s, measured with a bf16 matrix product")
    models = make_models(step.dry)
    flops = count_flops(step, models, device)
    usual, small = (4, 2) if step.dry else (1024, 256)
    largest = 8 if step.dry else 65536
    batches = (usual,) if step.dry else (usual, small)
    for batch in batches:
        with step.guard_case(f"eager, batch {batch:,}"):
            measure(step, models, device, batch, [(name, False) for name in SIDES], flops, peak)
        free_memory(device)
    for name in SEARCHED:
        with step.guard_case(f"largest batch, {name}"):
            find_largest(step, models, device, name, range_of_batches(2 * usual, largest), flops, peak)
        free_memory(device)
    for batch in batches:
        for name in COMPILE_FIRST:  # one at a time: compiling takes long, and what is measured is kept
            with step.guard_case(f"compiled, {name}, batch {batch:,}"):
                measure(step, models, device, batch, [(REFERENCE, False), (name, True)], flops, peak)
            free_memory(device)
    counted = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    step.note(f"compiled graphs: {counted}")


def range_of_batches(first: int, last: int) -> Iterable[int]:
    return itertools.takewhile(lambda batch: batch <= last, (first << k for k in itertools.count()))


def make_models(dry: bool) -> Models:
    changes: dict[str, Any] = {}
    if dry:
        changes = {
            "embed_dim": 32,
            "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
            "text_cfg": {"width": 32, "heads": 2, "layers": 2},
        }
    teacher = build_model(ModelSpec(model="ViT-B-16", init="random", model_cfg=changes), seed=1)
    student = build_model(ModelSpec(model="ViT-B-16" if dry else "vit_t_16", init="random", model_cfg=changes), seed=0)
    for model in (teacher, student):
        model.probe_fast_paths()
    return Models(teacher, student, student.image_size)


def make_host_batches(models: Models, device: torch.device, size: int, number: int = 2) -> list[HostBatch]:
    """Return batches of noise, with captions as long as those of CC3M and CC12M; large ones repeat their samples."""
    pin = torch.Tensor.pin_memory if device.type == "cuda" else torch.Tensor.contiguous
    made = []
    for seed in range(number):
        pixels, ids_BT = make_batch(min(size, 2048), seed)
        pixels = pixels[:, :, : models.image_size, : models.image_size]
        repeats = -(-size // len(pixels))
        pixels, ids_BT = pixels.repeat(repeats, 1, 1, 1)[:size], ids_BT.repeat(repeats, 1)[:size]
        features = [torch.randn(size, models.teacher.embed_dim) for _ in range(2)]
        image_BE, text_BE = (pin(torch.nn.functional.normalize(x, dim=-1)) for x in features)
        ids_BL = trim_tokens(models.student.net, ids_BT)
        made.append(HostBatch(pin(pixels), pin(ids_BT), pin(ids_BL.contiguous()), (image_BE, text_BE)))
    return made


# The sides ------------------------------------------------------------------------------------------------------------


def make_side(name: str, compiled: bool, models: Models, device: torch.device, batch: int) -> Side:
    spec = DistillSpec(
        steps=1000, batch_size=batch, lr=1e-5, warmup=100, precision="bf16", teacher_precision="bf16", compile=compiled
    )
    make = make_ours if name.startswith("ours") else make_straightforward
    return Side(name, compiled, make(name, models, device, spec))


def make_straightforward(
    name: str, models: Models, device: torch.device, spec: DistillSpec
) -> Callable[[HostBatch], DeviceClock]:
    teacher, student = (copy.deepcopy(model) for model in (models.teacher, models.student))
    for model in (teacher, student):
        model.net.to(device)
        if spec.compile:
            compile_towers(model.net)
    clocks: list[DeviceClock] = []

    def make_clock() -> DeviceClock:
        return clocks[-1]

    plain = straightforward(teacher, student, spec, make_clock)
    precision = torch.autocast(device.type, torch.bfloat16) if name == REFERENCE else nullcontext()

    def take(batch: HostBatch) -> DeviceClock:
        clocks[:] = [DeviceClock(device)]
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name.endswith("TF32")
        with clocks[0]("copy"):
            here = batch.pixels.to(device, non_blocking=True), batch.ids_BT.to(device, non_blocking=True)
        with precision:
            plain(0, here)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        return clocks[0]

    return take


def make_ours(name: str, models: Models, device: torch.device, spec: DistillSpec) -> Callable[[HostBatch], DeviceClock]:
    student, is_live = copy.deepcopy(models.student), name == "ours, live teacher"
    guide: Any = CachedTeacher(torch.tensor(100.0, device=device))
    if is_live:
        guide = live_teacher(copy.deepcopy(models.teacher), spec.teacher_precision, device, compiled=spec.compile)
    processes = Processes(0, 1, device)
    teacher: Any = SimpleNamespace(embed_dim=models.teacher.embed_dim)
    trainee = TrainingModule(student, teacher, spec, processes).train()
    optimizer = make_optimizer(trainee, spec)
    forward = Forward(trainee, trainee, spec, processes, 0)
    clocks: list[DeviceClock] = []
    trainee.register_forward_pre_hook(lambda *_: clocks[-1].begin("student"))
    trainee.register_forward_hook(lambda *_: clocks[-1].end("student"))

    def take(batch: HostBatch) -> DeviceClock:
        clocks[:] = [DeviceClock(device)]
        clock, sample_B = clocks[0], np.arange(len(batch.pixels))
        with clock("copy"):
            of_teacher = (batch.pixels, batch.ids_BL) if is_live else (None, None)
            features = None if is_live else batch.features
            prepared = PreparedBatch(
                batch.pixels, batch.ids_BL, *of_teacher, [], sample_B, 0, teacher_features=features
            ).to(device)
        with clock("teacher"):
            teacher_features = guide.features(prepared)
        with clock("student and losses"):
            done = forward.run(prepared, teacher_features, 0)
        with clock("backward"):
            optimizer.zero_grad(set_to_none=True)
            forward.backward(done, prepared, 0)
        with clock("optimizer"):
            clip_gradients(trainee, None)
            optimizer.step()
            trainee.clamp_parameters_()
        return clock

    return take


# Measuring ------------------------------------------------------------------------------------------------------------


def measure(
    step: Step, models: Models, device: torch.device, batch: int, wanted: list[tuple[str, bool]],
    flops: dict[str, float], peak: float,
) -> None:  # fmt: skip
    """Measure sides in turns at one batch, and record a row for each; those without time or memory have none."""
    batches = make_host_batches(models, device, batch)
    sides = []
    for name, compiled in wanted:
        if step.left_s() < (60 if compiled and not step.dry else 15):
            step.note(f"batch {batch:,}: no time left for {name}{', compiled' if compiled else ''}")
            continue
        side, problem = prepare(name, compiled, models, device, batches)
        if side is None:
            step.record("training step", batch=batch, side=name, compiled=compiled, problem=problem)
        else:
            sides.append(side)
    interleave(step, sides, batches, device)
    reference = next((side for side in sides if (side.name, side.compiled) == (REFERENCE, False)), None)
    measured = [each for each in sides if each.seconds]
    if any(compiled for _, compiled in wanted):  # the reference has a row already
        measured = [each for each in measured if each.compiled]
    for each in measured:
        step.record("training step", **make_row(each, reference, batch, flops, peak))


def prepare(
    name: str, compiled: bool, models: Models, device: torch.device, batches: list[HostBatch]
) -> tuple[Side | None, str]:
    """Return a side after its first steps, which compile, choose kernels and make the optimizer's state."""
    free_memory(device)
    before, started = count_bytes(device), time.monotonic()
    side = None
    try:
        side = make_side(name, compiled, models, device, len(batches[0].pixels))
        take_turn(side, [*batches, batches[0]], device)
    except torch.OutOfMemoryError:
        side, problem = None, "out of memory"
    except Exception as error:  # of the compiler, say; other sides are still measured
        side, problem = None, f"{type(error).__name__}: {one_line(error)}"
    if side is None:
        free_memory(device)
        return None, problem
    side.model_bytes, side.warmup_s = count_bytes(device) - before, time.monotonic() - started
    side.seconds, side.parts, side.peak_bytes = [], [], 0
    return side, ""


def interleave(step: Step, sides: list[Side], batches: list[HostBatch], device: torch.device) -> None:
    rounds, steps_of_turn = (1, 1) if step.dry else (5, 4 if len(batches[0].pixels) <= 256 else 2)
    for number in range(rounds):
        for side in sides[number % max(1, len(sides)) :] + sides[: number % max(1, len(sides))]:
            if number == 0 or step.left_s() > 5:
                take_turn(side, (batches * steps_of_turn)[:steps_of_turn], device)


def take_turn(side: Side, batches: list[HostBatch], device: torch.device) -> None:
    """Take steps one after the other; record the seconds of a step, its parts, and the memory at the peak."""
    before = count_bytes(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    whole = DeviceClock(device)
    with whole("all"):
        clocks = [side.take(batch) for batch in batches]
    seconds = whole.parts["all"] / len(batches)
    side.seconds.append(seconds)
    found = [clock.parts for clock in clocks]
    for parts in found:
        if "student and losses" in parts:
            parts["losses"] = parts.pop("student and losses") - parts["student"]
    side.parts += found
    if device.type == "cuda":
        side.peak_bytes = max(side.peak_bytes, torch.cuda.max_memory_allocated(device) - before + side.model_bytes)


def make_row(side: Side, reference: Side | None, batch: int, flops: dict[str, float], peak: float) -> dict[str, Any]:
    seconds = statistics.median(side.seconds)
    row: dict[str, Any] = {
        "batch": batch,
        "side": side.name,
        "compiled": side.compiled,
        "images_per_s": batch / seconds,
        "step_ms": 1e3 * seconds,
        "spread": (max(side.seconds) - min(side.seconds)) / seconds,
        "to_bf16_loop": None,
        "mfu": None,
        "memory_gb": side.peak_bytes / 1e9 or None,
    }
    if reference and len(reference.seconds) == len(side.seconds):
        row["to_bf16_loop"] = statistics.median(a / b for a, b in zip(reference.seconds, side.seconds, strict=True))
    if side.name in flops:
        row["mfu"] = flops[side.name] * batch / seconds / (1e12 * peak)
    for column, names in PARTS.items():
        each = [sum(parts.get(name, 0.0) for name in names) for parts in side.parts]
        row[f"{column}_share"] = statistics.median(each) / seconds
    row["warmup_s"] = side.warmup_s
    return row


def find_largest(
    step: Step, models: Models, device: torch.device, name: str, sizes: Iterable[int], flops: dict[str, float],
    peak: float,
) -> None:  # fmt: skip
    """Double the batch until it does not fit, and record the largest that does."""
    best = None
    for size in sizes:
        if step.left_s() < (5 if step.dry else 100):  # what compiles comes after this
            step.note(f"{name}: no time to try a batch of {size:,}")
            break
        batches = make_host_batches(models, device, size, 1)
        side, problem = prepare(name, False, models, device, batches)
        if side is None:
            step.note(f"{name}: a batch of {size:,}: {problem}")
            break
        try:
            take_turn(side, batches, device)
            best = make_row(side, None, size, flops, peak)
        except torch.OutOfMemoryError as error:
            step.note(f"{name}: a batch of {size:,}: {one_line(error)}")
            break
        finally:
            del side
            free_memory(device)
    if best:
        step.record("largest batch that fits, eager, doubled from 1,024", **best)


def count_flops(step: Step, models: Models, device: torch.device) -> dict[str, float]:
    """Return for each side the operations of a step, per image: two for each multiplication with an addition."""
    found = {}
    size = 2 if step.dry else 32
    batches = make_host_batches(models, device, size, 1)
    for name in SIDES:
        side = make_side(name, False, models, device, size)
        counter = FlopCounterMode(display=False)
        try:
            with counter, without_attention_fast_path():  # which it would count as nothing
                side.take(batches[0])
            found[name] = counter.get_total_flops() / size
        except Exception as error:
            step.note(f"{name}: operations could not be counted: {one_line(error)}")
        del side
    for name, value in found.items():
        step.record("operations of a step", side=name, gflop_per_image=value / 1e9)
    free_memory(device)
    return found


def count_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
