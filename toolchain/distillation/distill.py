"""Train a student against a frozen teacher, or without one.

The loop follows the paper: batch -> teacher's and student's features -> objectives -> one weighted sum -> step.
Batches, masks and all other random seeds are functions of the step.  A run therefore resumes exactly from any
checkpoint, with any number of loader workers, and sees the same batches with any number of ranks (distributed.py).
"""

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from toolchain.data.bad_samples import Damage, Ledger
from toolchain.data.batch import TrainingData
from toolchain.distillation.batch_norms import find_batch_norms
from toolchain.distillation.checkpoints import Checkpoints
from toolchain.distillation.features import TeacherFeatures
from toolchain.distillation.forward_pass import Forward
from toolchain.distillation.loader import PreparedBatch, load_batches
from toolchain.distillation.memory import divisors, fit_parts
from toolchain.distillation.non_finite import non_finite_error, step_if_finite
from toolchain.distillation.objectives import select
from toolchain.distillation.teacher import open_teacher
from toolchain.distillation.teacher_cache import TeacherCache, TeacherCaches
from toolchain.distillation.training_log import StepClock, UnreadRow, is_logged, open_log, start_row
from toolchain.distillation.training_module import TrainingModule, clip_gradients, make_optimizer
from toolchain.distillation.training_options import TrainingOptions
from toolchain.distributed import ALONE, Processes
from toolchain.errors import ClipkdError, Interrupted, UsageError
from toolchain.models.build import save_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.finite import describe_non_finite
from toolchain.models.tf32 import float32_products
from toolchain.progress import Progress
from toolchain.recipe.data import MAX_DAMAGED
from toolchain.recipe.distill import DistillSpec
from toolchain.stage import SCRATCH

HEADS = "heads.safetensors"
CHECKPOINTS = Path(SCRATCH, "checkpoints")
_NO_OPTIONS = TrainingOptions()


@dataclass(frozen=True)
class Training:
    """A student, its teacher, its data and a schedule: everything that decides the numbers of a run."""

    spec: DistillSpec
    student: ClipModel
    """Trained in place."""

    teacher: ClipModel | TeacherCache | TeacherCaches | None
    data: TrainingData
    seed: int = 0
    max_damaged: float = MAX_DAMAGED
    """Fraction of corrupt samples above which training stops."""

    accuracy: Callable[[ClipModel, Processes], dict[str, float]] | None = None
    """Scores the student every `spec.evaluate_every` steps (a collective call)."""

    @property
    def steps(self) -> int:
        return self.spec.num_steps(self.data.steps_per_epoch)

    def is_scored(self, step: int) -> bool:
        """Return True if the student is scored after `step` steps."""
        every = self.spec.evaluate_every
        return self.accuracy is not None and every is not None and (step % every == 0 or step == self.steps)


def distill(
    training: Training,
    folder: Path,
    progress: Progress,
    *,
    options: TrainingOptions = _NO_OPTIONS,
    processes: Processes = ALONE,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train the student and save it in `folder`; return what the manifest records.

    Checkpoints stay in the scratch directory of `folder`; the caller removes them.  The same call resumes from the last
    checkpoint, and only saves the student again if that is of the last step.  `say` receives messages, but no progress.

    Raises:
        ClipkdError: a loss, a gradient or a weight became NaN or infinite, or the GPU is out of memory.
        Interrupted: SIGTERM or SIGINT arrived; a checkpoint of the last completed step is saved.
    """
    spec, steps, rows = training.spec, training.steps, _check(training, processes)
    say = say if processes.leads else lambda _: None
    checkpoints = Checkpoints(
        folder / CHECKPOINTS, options.keep_checkpoints, options.checkpoint_steps, 60 * options.checkpoint_minutes
    )
    with _explain_full_memory(spec):  # other programs may use the GPU, so that not even the models fit
        run = _start(training, folder, processes, say)
        step, elapsed_s = run.resume(checkpoints)
        run = run.fit_memory(rows).wrap()
    loaded = load_batches(
        training.data, range(step, steps), rows, training.student, training.teacher, options.workers or 0
    )
    clock = StepClock(processes.device, spec.batch_size)
    started, first = time.monotonic() - elapsed_s, step
    unread: deque[UnreadRow] = deque()
    run.trainee.train()
    with (
        closing(loaded) as batches,
        open_log(folder, step, processes) as log,
        _stop_requests() as stop_requested,
        processes.explain_lost_rank(),
        _explain_full_memory(spec),
        float32_products(tf32=spec.tf32),
    ):
        while step < steps:
            batch = run.load_batch(batches, clock)
            unread.append(run.train_step(batch, step, clock))
            step += 1
            stopping, saving = run.agree(batch.damaged, step, stop_requested(), checkpoints.due(step))
            saving |= stopping or step == steps
            for row in run.read_rows(unread, wait=saving or training.is_scored(step) or step == first + 1):
                if processes.leads and (is_logged(row["step"], steps) or "accuracy" in row):
                    log.write(row)
            if processes.leads:
                progress("training", step, steps, f"loss {row['loss']:.3f}  {row['images_per_s']:.0f} images/s")
                if saving:
                    log.flush()
                    run.require_finite_weights(step)
                    checkpoints.save(step, run.state(time.monotonic() - started))
            if stopping and step < steps:
                processes.wait()  # for the checkpoint: torchrun ends all ranks once one has ended
                raise Interrupted(f"{folder}: stopped after step {step} of {steps}; run the same command to resume")
    summary = run.summary(time.monotonic() - started)
    run.save()
    return summary


def learning_rate(spec: DistillSpec, steps: int, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then half a cosine down to 0 (CLIP-KD's schedule)."""
    if step < spec.warmup:
        return spec.lr * (step + 1) / spec.warmup
    done = (step - spec.warmup) / max(1, steps - spec.warmup)
    return spec.lr * 0.5 * (1 + math.cos(math.pi * done))


def check_warmup(spec: DistillSpec, steps: int) -> None:
    """Raise an error if a training of `steps` steps ends before its warm-up.

    Raises:
        UsageError: it does.
    """
    if spec.warmup >= steps:
        raise UsageError(f"distill.warmup ({spec.warmup}) must be less than the {steps} steps of {spec.epochs} epochs")


def split_batch(spec: DistillSpec, processes: Processes) -> slice:
    """Return this rank's rows of every batch.

    Raises:
        UsageError: the ranks, or the parts of `accumulate`, cannot have equal shares of the batch.
    """
    rows = processes.rows(spec.batch_size)
    own = rows.stop - rows.start
    if spec.accumulate != "auto" and own % spec.accumulate:
        ranks = f"{processes.size} rank{'s' if processes.size > 1 else ''}"
        raise UsageError(
            f"distill.accumulate {spec.accumulate} cannot split {own} samples "
            f"(distill.batch_size {spec.batch_size} over {ranks}) into equal parts; "
            f"choose one of {', '.join(map(str, divisors(own)))}, or auto"
        )
    return rows


def _check(training: Training, processes: Processes) -> slice:
    """Return this rank's rows of every batch.

    Raises:
        UsageError: the run cannot be trained as asked.
    """
    spec = training.spec
    check_warmup(spec, training.steps)
    rows = split_batch(spec, processes)
    if not select(spec.loss_weights.model_dump(), with_teacher=training.teacher is not None):
        raise UsageError("distill.loss_weights.task is 0 and there is no teacher; nothing to train")
    return rows


# A run and its state --------------------------------------------------------------------------------------------------


def _start(training: Training, folder: Path, processes: Processes, say: Callable[[str], None]) -> "_Run":
    """Return the run before its first step."""
    spec = training.spec
    torch.manual_seed(training.seed)  # the same initial heads on every rank
    module = TrainingModule(training.student, training.teacher, spec, processes)
    teacher = open_teacher(training.teacher, spec, processes.device) if training.teacher else None
    optimizer = make_optimizer(module, spec)
    scaler = torch.amp.GradScaler(processes.device.type, enabled=spec.precision == "fp16")
    ledger = Ledger(training.data.left_out, training.data.num_samples, training.max_damaged)
    if training.data.left_out:
        ledger.check(training.data.num_samples)
    forward = Forward(module, module, spec, processes, training.seed)
    failed = torch.zeros((), dtype=torch.bool, device=processes.device)
    teach = teacher.features if teacher else None
    return _Run(training, folder, forward, teach, optimizer, scaler, failed, ledger, say)


@dataclass(frozen=True)
class _Run:
    """One attempt at a training: the constants of its steps, and the state that the steps change."""

    training: Training
    folder: Path
    forward: Forward
    teacher_features: Callable[[PreparedBatch], TeacherFeatures] | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    failed: Tensor
    """True, on the device, once a step was not finite; then the weights change no more."""

    ledger: Ledger
    say: Callable[[str], None]

    @property
    def trainee(self) -> TrainingModule:
        return self.forward.trainee

    @property
    def processes(self) -> Processes:
        return self.forward.processes

    def fit_memory(self, rows: slice) -> "_Run":
        """Return the run with the number of parts that fits the memory, and report it if it was not the recipe's.

        Raises:
            UsageError: a step does not fit.
        """
        spec, size, teacher = self.forward.spec, rows.stop - rows.start, self.training.teacher
        self.trainee.train()
        parts = fit_parts(self.forward, self.optimizer, size, teacher.embed_dim if teacher else None)
        if spec.accumulate == "auto":
            self.say(f"distill.accumulate: auto takes {parts} part(s) of {size // parts} samples")
        if parts > 1 and spec.batch_norm != "frozen" and find_batch_norms(self.trainee):
            together = size // parts * (1 if spec.batch_norm == "per_process" else self.processes.size)
            self.say(f"distill.accumulate: batch norms take their statistics over each part of {together} samples")
        spec = spec.model_copy(update={"accumulate": parts})
        return replace(self, forward=replace(self.forward, spec=spec))

    def wrap(self) -> "_Run":
        """Return the run with gradients averaged over ranks, starting from the parameters of rank 0."""
        module = self.processes.data_parallel(self.trainee)
        return replace(self, forward=replace(self.forward, module=module))

    def load_batch(self, batches: Iterator[PreparedBatch], clock: StepClock) -> PreparedBatch:
        """Return the next batch, on the rank's device; the step begins with it."""
        clock.restart()
        with clock("data"):
            return next(batches).to(self.processes.device)

    def train_step(self, batch: PreparedBatch, step: int, clock: StepClock) -> UnreadRow:
        """Take one step, and return its row of the log; on a GPU, return before the GPU has computed it."""
        spec, trainee = self.training.spec, self.trainee
        with clock("teacher"):
            teacher_features = self._teach(batch)
        forward_pass = self.forward.run(batch, teacher_features, step)
        lr = learning_rate(spec, self.training.steps, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        self.forward.backward(forward_pass, batch, step, self.scaler)
        self.scaler.unscale_(self.optimizer)
        grad_norm = clip_gradients(trainee, spec.grad_clip_norm)
        step_if_finite(self.optimizer, self.scaler, forward_pass.loss.detach(), grad_norm, self.failed)
        trainee.clamp_parameters_()
        return start_row(step, lr, grad_norm, forward_pass, spec.loss_weights.model_dump(), self.failed, clock)

    def read_rows(self, unread: deque[UnreadRow], *, wait: bool) -> Iterator[dict[str, Any]]:
        """Yield the rows of the steps that have ended, oldest first, with the accuracy where the student is scored.

        The last row stays unread, so that the host starts the next step meanwhile; `wait` reads it too.

        Raises:
            ClipkdError: a step was not finite (a collective call).
        """
        while len(unread) > (0 if wait else 1):
            row, failed = unread.popleft().read()
            if failed:
                raise self._explain_failure(row)
            if self.training.accuracy and self.training.is_scored(row["step"] + 1):
                row["accuracy"] = self.evaluate(self.training.accuracy)
            yield row

    def _explain_failure(self, row: dict[str, Any]) -> ClipkdError:
        """Return the error of a step that was not finite, computed again: the weights are still those of this step."""
        training, step = self.training, row["step"]
        rows = self.processes.rows(training.spec.batch_size)
        loaded = load_batches(training.data, range(step, step + 1), rows, training.student, training.teacher, 0)
        batch = next(loaded).to(self.processes.device)
        with torch.no_grad():  # without the wrapper, which expects a backward pass after each forward pass
            forward_pass = replace(self.forward, module=self.trainee).run(batch, self._teach(batch), step)
        return non_finite_error(self.folder, row, training.data, self.forward, forward_pass, batch)

    def _teach(self, batch: PreparedBatch) -> TeacherFeatures | None:
        """Return the teacher's features; a teacher that runs takes as many samples at a time as the student."""
        if self.teacher_features is None:
            return None
        if self.forward.spec.parts == 1:
            return self.teacher_features(batch)
        found = [self.teacher_features(part) for part in batch.split(self.forward.spec.parts)]
        image_bE, text_bE = (torch.cat(parts) for parts in zip(*((x.image_BE, x.text_BE) for x in found), strict=True))
        return found[0]._replace(image_BE=image_bE, text_BE=text_bE)

    def agree(self, damaged: tuple[Damage, ...], step: int, stopping: bool, due: bool) -> tuple[bool, bool]:
        """Return whether any rank was asked to stop, and whether a checkpoint is due on rank 0 (a collective call).

        It also counts the corrupt samples that any rank met; too many of them stop the run.
        """
        any_damaged, stopping, due = self.processes.any_of_each(bool(damaged), stopping, due and self.processes.leads)
        if any_damaged:
            by_rank = self.processes.gather_objects(damaged)
            for message in self.ledger.add(damage for of_rank in by_rank for damage in of_rank):
                self.say(message)
            self.ledger.check(step * self.training.spec.batch_size)
        return stopping, due

    def evaluate(self, accuracy: Callable[[ClipModel, Processes], dict[str, float]]) -> dict[str, float]:
        """Return the student's current accuracy."""
        self.trainee.eval()
        self.processes.share_buffers(self.trainee)
        found = accuracy(self.training.student, self.processes)
        self.trainee.train()
        return found

    def state(self, elapsed_s: float) -> dict[str, Any]:
        """Return the state a resumed run needs; batches need none, because they are functions of the step."""
        return {
            "trained": self.trainee.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "damaged": self.ledger.state(),
            "elapsed_s": elapsed_s,
        }

    def resume(self, checkpoints: Checkpoints) -> tuple[int, float]:
        """Load the last checkpoint; return the step to continue with and the seconds already spent.

        Raises:
            ClipkdError: its weights are not finite, or the ranks found different ones (a collective call).
        """
        state = checkpoints.load(self.say)
        found = set(self.processes.gather_objects(0 if state is None else int(state["step"])))
        if len(found) > 1:
            raise ClipkdError(
                f"{self.folder}: the ranks found checkpoints of different steps "
                f"({', '.join(map(str, sorted(found)))}). All machines must see the same run directory"
            )
        if state is None:
            return 0, 0.0
        if wrong := describe_non_finite(state["trained"]):
            raise ClipkdError(
                f"{checkpoints.folder}: the checkpoint of step {state['step']} has {wrong}. Delete the folder to train "
                "from the start, with a lower distill.lr"
            )
        self.trainee.load_state_dict(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.ledger.restore(state["damaged"])
        return int(state["step"]), float(state["elapsed_s"])

    def require_finite_weights(self, step: int) -> None:
        """Raise an error if the weights after `step` steps are not finite; a checkpoint of them would be useless."""
        if wrong := describe_non_finite(self.trainee.state_dict()):
            raise ClipkdError(
                f"{self.folder}: the weights are not finite after step {step}: {wrong}. Earlier checkpoints are "
                "intact; lower distill.lr"
            )

    def save(self) -> None:
        """Write the trained student and its distillation heads."""
        self.trainee.eval()
        if self.processes.leads:
            save_model(self.training.student, self.folder)
            if heads := self.trainee.heads.state_dict():
                heads = {name: value.detach().cpu().contiguous() for name, value in heads.items()}
                save_file(heads, self.folder / HEADS)
        self.processes.wait()

    def summary(self, train_s: float) -> dict[str, Any]:
        """Return what the manifest records."""
        device = str(torch.cuda.get_device_name()) if self.processes.device.type == "cuda" else "cpu"
        found = {"train_s": round(train_s, 1), "steps": self.training.steps, "processes": self.processes.size}
        return found | {"device": device} | self.ledger.summary()


# Stopping early -------------------------------------------------------------------------------------------------------


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns True after SIGTERM or SIGINT; a second signal acts at once."""
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
def _explain_full_memory(spec: DistillSpec) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        hints = [f"Lower distill.batch_size ({spec.batch_size}) or train on more ranks (torchrun)"]
        hints += ["set distill.precision: bf16"] if spec.precision == "fp32" else []
        hints += ["set distill.teacher_precision: bf16"] if spec.teacher_precision == "fp32" else []
        raise ClipkdError(f"the GPU is out of memory: {error}. {'; or '.join(hints)}") from error
