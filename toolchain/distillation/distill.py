"""Train a student against a frozen teacher, or alone.

The loop is one line of the paper after another: batch -> teacher's and student's features -> objectives -> one weighted
sum -> step.  Batches, masks and the seed of anything else random are functions of the step, so that a run continues
from any checkpoint exactly, with any number of loader workers, and with any number of processes (`processes.py`) sees
the same batches.

    B batch of all processes   b rows of one process   D student width   E teacher width   T tokens
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from toolchain.data.bad_samples import Ledger
from toolchain.data.batch import TrainingData
from toolchain.distillation.checkpoints import Checkpoints
from toolchain.distillation.loader import Fed, feed
from toolchain.distillation.objectives import TeacherFeatures, gather_features, loss_terms
from toolchain.distillation.teacher import DTYPES, CachedTeacher, LiveTeacher, live_teacher
from toolchain.distillation.teacher_cache import TeacherCache
from toolchain.distillation.trainee import Trainee, clip_gradients, make_optimizer
from toolchain.distillation.training_log import ForwardPass, StepClock, log_row, logs, open_log
from toolchain.distributed import ALONE, Processes
from toolchain.errors import ClipkdError, Interrupted, UsageError
from toolchain.models.build import save_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.onednn import on_onednn
from toolchain.progress import Progress
from toolchain.recipe.data import MAX_DAMAGED
from toolchain.recipe.distill import DistillSpec
from toolchain.recipe.section import Precision
from toolchain.stage import SCRATCH

HEADS = "heads.safetensors"
CHECKPOINTS = Path(SCRATCH, "checkpoints")


@dataclass(frozen=True)
class Engine:
    """What decides where and how fast training runs, and no number of its result."""

    processes: Processes = ALONE
    workers: int = 0
    """Loader processes beside each training process."""

    checkpoint_steps: int | None = None
    checkpoint_s: float = 60.0
    keep_checkpoints: int = 2
    max_damaged: float = MAX_DAMAGED
    """Share of damaged samples above which training stops."""

    say: Callable[[str], None] = lambda text: None
    """Tells the user something that is neither progress nor an error."""


_PLAIN = Engine()


def distil(
    spec: DistillSpec,
    student: ClipModel,
    teacher: ClipModel | TeacherCache | None,
    data: TrainingData,
    folder: Path,
    progress: Progress,
    *,
    seed: int = 0,
    engine: Engine = _PLAIN,
    accuracy: Callable[[ClipModel, Processes], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Train `student` in place and save it in `folder`; returns what the manifest should say.

    Checkpoints are left in `folder`'s scratch, for whoever made the folder to remove: the same call continues from the
    last, and where that is of the last step only saves again.  `accuracy` scores the student every
    `spec.evaluate_every` steps, every process taking part.

    Raises:
        ClipkdError: a loss or a gradient became NaN or infinite, or the memory of the GPU does not suffice.
        Interrupted: asked to stop, by SIGTERM or the keyboard; a checkpoint of the last step is saved.
    """
    steps = spec.steps or (spec.epochs or 0) * data.steps_per_epoch
    if spec.warmup >= steps:
        raise UsageError(f"distill.warmup ({spec.warmup}) must be less than the {steps} steps of {spec.epochs} epochs")
    processes, weights = engine.processes, spec.loss_weights.model_dump()
    rows = processes.rows(spec.batch_size)
    if teacher is None and not weights["task"]:
        raise UsageError("distill.loss_weights.task is 0 and there is no teacher; nothing to train")
    torch.manual_seed(seed)  # of the heads: alike in every process
    trained = Trainee(student, teacher, spec, processes)
    guide = _guide(spec, teacher, processes) if teacher else None
    optimizer = make_optimizer(trained, spec)
    scaler = torch.amp.GradScaler(processes.device.type, enabled=spec.precision == "fp16")
    checkpoints = Checkpoints(
        folder / CHECKPOINTS, engine.keep_checkpoints, engine.checkpoint_steps, engine.checkpoint_s
    )
    say: Callable[[str], None] = engine.say if processes.leads else lambda _: None
    ledger = Ledger(data.left_out, data.num_samples, engine.max_damaged)
    if data.left_out:
        ledger.check(data.num_samples)
    step, before_s = _resume(checkpoints, trained, optimizer, scaler, ledger, say)
    module = processes.together(trained)
    batches = closing(feed(data, range(step, steps), rows, student, teacher, engine.workers))
    clock = StepClock(processes.device)
    started = time.monotonic()
    trained.train()
    with (
        batches as fed,
        open_log(folder, step, processes) as log,
        _stop_requests() as stop_requested,
        _full_memory(spec),
    ):
        while step < steps:
            clock.restart()
            with clock("data"):
                batch = next(fed).to(processes.device)
            if processes.any(bool(batch.damaged)):
                for sentence in ledger.add(damage for part in processes.collect(batch.damaged) for damage in part):
                    say(sentence)
                ledger.check((step + 1) * spec.batch_size)
            with clock("teacher"):
                taught = guide.of(batch) if guide else None
            done = _forward(module, trained, student, batch, taught, spec, processes, seed, step)
            lr = learning_rate(spec, steps, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(done.loss).backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward untyped
            scaler.unscale_(optimizer)
            grad_norm = clip_gradients(trained, spec.grad_clip_norm)
            row = log_row(step, lr, grad_norm, done, weights)
            if not _is_finite(row, scaler):
                again = _forward(trained, trained, student, batch, taught, spec, processes, seed, step)
                raise _not_finite(folder, row, trained, again, data, processes)
            scaler.step(optimizer)
            scaler.update()
            trained.clamp_parameters_()
            step += 1
            row |= clock.shares(spec.batch_size)
            if accuracy and spec.evaluate_every and (step % spec.evaluate_every == 0 or step == steps):
                trained.eval()
                processes.share_buffers(trained)
                row["accuracy"] = accuracy(student, processes)
                trained.train()
            if processes.leads:
                if logs(step - 1, steps) or "accuracy" in row:
                    log.write(row)
                progress("training", step, steps, f"loss {row['loss']:.3f}  {row['images_per_s']:.0f} images/s")
            stopping = processes.any(stop_requested())
            if processes.leads and (checkpoints.due(step) or stopping or step == steps):
                log.flush()
                elapsed_s = before_s + time.monotonic() - started
                checkpoints.save(step, _state(trained, optimizer, scaler, ledger, elapsed_s))
            if stopping and step < steps:
                processes.wait()  # for the checkpoint: torchrun ends the others when one process has ended
                raise Interrupted(f"{folder}: stopped after step {step} of {steps}; the same command continues there")
    trained.eval()
    train_s = before_s + time.monotonic() - started
    if processes.leads:
        save_model(student, folder)
        if heads := trained.heads.state_dict():
            save_file({name: value.detach().cpu().contiguous() for name, value in heads.items()}, folder / HEADS)
    processes.wait()
    return {
        "train_s": round(train_s, 1),
        "steps": steps,
        "processes": processes.size,
        "device": str(torch.cuda.get_device_name()) if processes.device.type == "cuda" else "cpu",
    } | ledger.summary()


def _forward(
    module: nn.Module,
    trained: "Trainee",
    student: ClipModel,
    batch: Fed,
    taught: TeacherFeatures | None,
    spec: DistillSpec,
    processes: Processes,
    seed: int,
    step: int,
) -> ForwardPass:
    torch.manual_seed(_seed_of(seed, step, processes.rank))  # of dropout, where a tower has any
    masks = trained.masks(seed, batch.sample_b, step)
    with _autocast(spec.precision, processes.device), on_onednn(processes.device, compiled=spec.compile):
        rows, scales = module(student.normalise(batch.student_pixels), batch.student_ids, taught, *masks)
    features = gather_features(rows, processes.gather)
    teacher = None
    if taught is not None:
        image_BE, text_BE = processes.gather(taught.image_BE), processes.gather(taught.text_BE)
        teacher = TeacherFeatures(image_BE, text_BE, taught.logit_scale)
    weights = spec.loss_weights.model_dump()
    terms = loss_terms(features, scales["logit_scale"], teacher, trained.heads, weights)
    loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    return ForwardPass(loss, terms, scales, features, teacher)


def learning_rate(spec: DistillSpec, steps: int, step: int) -> float:
    """Linear warm-up, then half a cosine down to 0 (CLIP-KD's schedule)."""
    if step < spec.warmup:
        return spec.lr * (step + 1) / spec.warmup
    done = (step - spec.warmup) / max(1, steps - spec.warmup)
    return spec.lr * 0.5 * (1 + math.cos(math.pi * done))


def _autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, DTYPES[precision]) if precision != "fp32" else nullcontext()


def _seed_of(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


# The teacher ----------------------------------------------------------------------------------------------------------


def _guide(spec: DistillSpec, teacher: ClipModel | TeacherCache, processes: Processes) -> LiveTeacher | CachedTeacher:
    if isinstance(teacher, TeacherCache):
        return CachedTeacher(torch.tensor(teacher.logit_scale, device=processes.device))
    return live_teacher(teacher, spec.teacher_precision, processes.device, compiled=spec.compile)


def _is_finite(row: dict[str, Any], scaler: torch.amp.GradScaler) -> bool:
    """fp16 gradients may overflow: the scaler then skips the step and halves its scale, until there is none left."""
    if not math.isfinite(row["loss"]):
        return False
    if not math.isfinite(row["grad_norm"]):
        row["grad_norm"] = None
        return scaler.is_enabled() and scaler.get_scale() >= 1
    return True


def _not_finite(
    folder: Path, row: dict[str, Any], trained: Trainee, again: ForwardPass, data: TrainingData, processes: Processes
) -> ClipkdError:
    """What to tell the user: the step, the terms to blame, and the samples."""
    whole = data.batch(row["step"], slice(None), [trained.student.geometry])  # pictures too: damaged ones are replaced
    sample_B = whole.sample_B
    values = {name: term["unweighted"] for name, term in row["terms"].items()}
    blamed = [name for name, value in values.items() if not math.isfinite(value)]
    what = "loss"
    if not blamed:
        what = "gradient"
        parameters = list(trained.parameters())
        for name, term in again.terms.items():
            gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            # Each process has the gradient through its own rows.
            if processes.any(not all(gradient is None or gradient.isfinite().all() for gradient in gradients)):
                blamed.append(name)
    more = " and others" if len(sample_B) > 8 else ""
    return ClipkdError(
        f"{folder}: the {what} is not finite at step {row['step']}: of {', '.join(blamed) or 'the weighted sum'} "
        f"(terms {values}; samples {sample_B[:8].tolist()}{more}). The last checkpoint is intact; lower distill.lr"
    )


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Ask whether SIGTERM or SIGINT has come; a second one acts at once."""
    asked: list[int] = []
    before = {int(number): signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, _: FrameType | None) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _full_memory(spec: DistillSpec) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        hints = [f"lower distill.batch_size ({spec.batch_size}) or add processes"]
        hints += ["set distill.precision: bf16"] if spec.precision == "fp32" else []
        hints += ["set distill.teacher_precision: bf16"] if spec.teacher_precision == "fp32" else []
        raise ClipkdError(f"the GPU's memory is full: {error}. Next: {'; or '.join(hints)}") from error


# Checkpoints ----------------------------------------------------------------------------------------------------------


def _state(
    trained: Trainee,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ledger: Ledger,
    elapsed_s: float,
) -> dict[str, Any]:
    """Everything a resumed run needs; batches need nothing, being functions of the step."""
    parts = {"trained": trained.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    return parts | {"damaged": ledger.state(), "elapsed_s": elapsed_s}


def _resume(
    checkpoints: Checkpoints,
    trained: Trainee,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ledger: Ledger,
    say: Callable[[str], None],
) -> tuple[int, float]:
    """The step to continue with and the seconds already spent."""
    state = checkpoints.load(say)
    if state is None:
        return 0, 0.0
    trained.load_state_dict(state["trained"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    ledger.restore(state["damaged"])
    return int(state["step"]), float(state["elapsed_s"])
