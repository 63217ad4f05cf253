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
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from toolchain.checkpoints import Checkpoints
from toolchain.damage import MAX_DAMAGED, Ledger
from toolchain.data import TrainingData
from toolchain.errors import ClipkdError, Interrupted, UsageError
from toolchain.feed import Fed, feed
from toolchain.losses import MAX_LOGIT_SCALE
from toolchain.masking import kept_patches, masked_image_features, num_patches
from toolchain.models import ClipModel, compile_towers, is_vision_transformer, save_model
from toolchain.objectives import DistillationHeads, StudentFeatures, TeacherBatch, gathered, loss_terms
from toolchain.onednn import on_onednn
from toolchain.processes import ALONE, Processes
from toolchain.recipe import DistillSpec, Precision
from toolchain.stages import SCRATCH
from toolchain.teacher import DTYPES, CachedTeacher, LiveTeacher, Progress, live_teacher
from toolchain.teacher_cache import TeacherCache
from toolchain.training_log import TrainingLog, logs

HEADS = "heads.safetensors"
CHECKPOINTS = Path(SCRATCH, "checkpoints")
_HEADS_WEIGHT_DECAY = 0.01  # of the projections that distillation adds: the released code leaves AdamW's default


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
    trained = _Trained(student, teacher, spec, processes)
    guide = _guide(spec, teacher, processes) if teacher else None
    optimizer = _optimizer(trained, spec)
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
    clock = _Clock(processes.device)
    started = time.monotonic()
    trained.train()
    with batches as fed, _log(folder, step, processes) as log, _stop_requests() as stop_requested, _full_memory(spec):
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
            grad_norm = _clip(trained, spec.grad_clip_norm)
            row = _row(step, lr, grad_norm, done, weights)
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


class _Pass(NamedTuple):
    """One step's forward pass, over the batch of all processes."""

    loss: Tensor
    terms: dict[str, Tensor]
    """Unweighted, those whose weight is not zero."""

    scales: dict[str, Tensor]
    student: StudentFeatures
    teacher: TeacherBatch | None


def _forward(
    module: nn.Module,
    trained: "_Trained",
    student: ClipModel,
    batch: Fed,
    taught: TeacherBatch | None,
    spec: DistillSpec,
    processes: Processes,
    seed: int,
    step: int,
) -> _Pass:
    torch.manual_seed(_seed_of(seed, step, processes.rank))  # of dropout, where a tower has any
    masks = trained.masks(seed, batch.sample_b, step)
    with _autocast(spec.precision, processes.device), on_onednn(processes.device, compiled=spec.compile):
        rows, scales = module(student.normalise(batch.student_pixels), batch.student_ids, taught, *masks)
    features = gathered(rows, processes.gather)
    teacher = None
    if taught is not None:
        image_BE, text_BE = processes.gather(taught.image_BE), processes.gather(taught.text_BE)
        teacher = TeacherBatch(image_BE, text_BE, taught.logit_scale)
    weights = spec.loss_weights.model_dump()
    terms = loss_terms(features, scales["logit_scale"], teacher, trained.heads, weights)
    loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    return _Pass(loss, terms, scales, features, teacher)


def learning_rate(spec: DistillSpec, steps: int, step: int) -> float:
    """Linear warm-up, then half a cosine down to 0 (CLIP-KD's schedule)."""
    if step < spec.warmup:
        return spec.lr * (step + 1) / spec.warmup
    done = (step - spec.warmup) / max(1, steps - spec.warmup)
    return spec.lr * 0.5 * (1 + math.cos(math.pi * done))


# What is trained ------------------------------------------------------------------------------------------------------


class _Trained(nn.Module):
    """The student and the heads that distillation adds: everything the optimizer moves and a checkpoint holds."""

    def __init__(
        self, student: ClipModel, teacher: ClipModel | TeacherCache | None, spec: DistillSpec, processes: Processes
    ) -> None:
        super().__init__()
        student.settle()
        self.net = student.net
        self.student = student
        weights = spec.loss_weights.model_dump()
        teacher_width = teacher.embed_dim if teacher else student.embed_dim
        self.heads = DistillationHeads(
            student.embed_dim, teacher_width, weights if teacher else {}, reference_compat=spec.reference_compat
        )
        # data-parallel training refuses parameters without a gradient
        reads_scale = any(weights[name] for name in (("task", "crd", "gd") if teacher else ("task",)))
        self.net.logit_scale.requires_grad_(reads_scale)
        if isinstance(bias := getattr(self.net, "logit_bias", None), nn.Parameter):
            bias.requires_grad_(False)  # of a sigmoid loss, which is not ours
        self._mask_ratio = spec.mask_ratio if self.heads.reads_masked_image else None
        dropout: Any = getattr(self.net.visual, "patch_dropout", None)
        self._patch_dropout = getattr(dropout, "prob", None)  # open_clip draws it from torch's generator, we by sample
        self.to(processes.device)
        if spec.compile:
            compile_towers(self.net)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids_bT: Tensor,
        teacher: TeacherBatch | None,
        shown_bK: Tensor | None,
        kept_bK: Tensor | None,
    ) -> tuple[StudentFeatures, dict[str, Tensor]]:
        """A process's rows of everything the objectives read, and the multipliers by name."""
        net: Any = self.net
        encode = self.student.encode_image
        if kept_bK is None:
            image_bD = encode(pixel_values)
        else:
            image_bD = masked_image_features(net.visual, pixel_values, kept_bK, encode)
        masked_bD = None
        if shown_bK is not None:
            masked_bD = masked_image_features(net.visual, pixel_values, shown_bK, encode)
        features = self.heads(image_bD, self.student.encode_text(input_ids_bT), teacher, masked_bD)
        scales = {"logit_scale": net.logit_scale.exp().reshape(())}  # some models keep it as a vector of one
        if self.heads.log_cross_logit_scale is not None:
            scales["cross_logit_scale"] = self.heads.cross_logit_scale
        if self.heads.log_fusion_logit_scale is not None:
            scales["fusion_logit_scale"] = self.heads.fusion_logit_scale
        return features, scales

    def masks(self, seed: int, sample_b: NDArray[np.int64], step: int) -> tuple[Tensor | None, Tensor | None]:
        """[b, K] each: the patches MFD shows the student, and those a tower's own patch dropout keeps; None without.

        Drawn by seed, sample and step, so that they do not depend on how a batch is shared among processes.
        """
        visual: Any = self.net.visual

        def kept(ratio: float | None, draw: int) -> Tensor | None:
            if not ratio:
                return None
            return kept_patches(seed, sample_b, draw, num_patches=num_patches(visual), mask_ratio=ratio)

        return kept(self._mask_ratio, 2 * step), kept(self._patch_dropout, 2 * step + 1)

    @torch.no_grad()
    def clamp_parameters_(self) -> None:
        self.net.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))  # type: ignore[operator]
        self.heads.clamp_parameters_()


def _optimizer(trained: _Trained, spec: DistillSpec) -> torch.optim.AdamW:
    """AdamW with CLIP-KD's groups.

    Of the student, matrices decay and vectors, biases and scales do not; of the heads the projections decay by AdamW's
    own default.  Transformers have faster moments than convolutional towers (CLIP-KD's scripts, from CLIP).
    """
    named = [(name, p) for name, p in trained.net.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim >= 2 and "bias" not in name]  # Swin has tables of biases
    free = [p for name, p in named if p.ndim < 2 or "bias" in name]
    heads = list(trained.heads.parameters())
    vectors_decay = _HEADS_WEIGHT_DECAY if spec.reference_compat else 0.0
    groups = [
        {"params": decayed, "weight_decay": spec.weight_decay},
        {"params": free, "weight_decay": 0.0},
        {"params": [p for p in heads if p.ndim >= 2], "weight_decay": _HEADS_WEIGHT_DECAY},
        {"params": [p for p in heads if p.ndim < 2], "weight_decay": vectors_decay},
    ]
    transformer = is_vision_transformer(trained.net.visual)  # type: ignore[arg-type]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=spec.lr,
        betas=(0.9, 0.98 if transformer else 0.999),
        eps=1e-6 if transformer else 1e-8,
        fused=True,
    )


def _clip(trained: _Trained, max_norm: float | None) -> Tensor:
    """The norm of all gradients together, which are then scaled down to `max_norm` at the most."""
    gradients = [p.grad for p in trained.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(trained.parameters(), max_norm, norm)
    return norm


def _autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, DTYPES[precision]) if precision != "fp32" else nullcontext()


def _seed_of(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


# The teacher ----------------------------------------------------------------------------------------------------------


def _guide(spec: DistillSpec, teacher: ClipModel | TeacherCache, processes: Processes) -> LiveTeacher | CachedTeacher:
    if isinstance(teacher, TeacherCache):
        return CachedTeacher(torch.tensor(teacher.logit_scale, device=processes.device))
    return live_teacher(teacher, spec.teacher_precision, processes.device, compiled=spec.compile)


# What is logged and what stops a run ----------------------------------------------------------------------------------


def _row(step: int, lr: float, grad_norm: Tensor, done: _Pass, weights: dict[str, float]) -> dict[str, Any]:
    """A step's row of the log, brought from the device in one piece."""
    similarity = _similarity(done.student, done.teacher) if done.teacher else {}
    tensors = {"loss": done.loss, "grad_norm": grad_norm, **done.scales, **done.terms, **similarity}
    numbers = dict(zip(tensors, torch.stack([t.detach().float() for t in tensors.values()]).tolist(), strict=True))
    row = {"step": step, "loss": numbers["loss"], "lr": lr, "grad_norm": numbers["grad_norm"]}
    row |= {name: numbers[name] for name in done.scales}
    terms = {name: numbers[name] for name in done.terms}
    row["terms"] = {name: {"unweighted": value, "weighted": weights[name] * value} for name, value in terms.items()}
    if similarity:
        row["similarity"] = {name: numbers[name] for name in similarity}
    return row


def _similarity(student: StudentFeatures, teacher: TeacherBatch) -> dict[str, Tensor]:
    """Mean cosines of the student's features, in the teacher's width, to the teacher's; empty where no head maps it."""
    image_BE, text_BE = student.image_BE, student.text_BE
    if image_BE is None or text_BE is None:
        if student.image_BD.shape[-1] != teacher.image_BE.shape[-1]:
            return {}
        image_BE, text_BE = student.image_BD, student.text_BD
    image, text = (image_BE * teacher.image_BE).sum(-1).mean(), (text_BE * teacher.text_BE).sum(-1).mean()
    return {"image": image, "text": text}


def _is_finite(row: dict[str, Any], scaler: torch.amp.GradScaler) -> bool:
    """fp16 gradients may overflow: the scaler then skips the step and halves its scale, until there is none left."""
    if not math.isfinite(row["loss"]):
        return False
    if not math.isfinite(row["grad_norm"]):
        row["grad_norm"] = None
        return scaler.is_enabled() and scaler.get_scale() >= 1
    return True


def _not_finite(
    folder: Path, row: dict[str, Any], trained: _Trained, again: _Pass, data: TrainingData, processes: Processes
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


class _Clock:
    """Seconds of a step, and of its parts; on a GPU of what it computed, not of what was asked for."""

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
        """What a row says of time, once the step's numbers have been read from the device."""
        for part, (begin, end) in self._events.items():
            self._parts[part] = begin.elapsed_time(end) / 1e3
        seconds = time.monotonic() - self._started
        shares = {f"{part}_fraction": round(spent / seconds, 4) for part, spent in self._parts.items()}
        return {"images_per_s": round(batch_size / seconds, 1)} | shares


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped


@contextmanager
def _log(folder: Path, step: int, processes: Processes) -> Iterator[Any]:
    if not processes.leads:
        yield None
        return
    with TrainingLog(folder, step) as log:
        yield log


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
    trained: _Trained,
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
    trained: _Trained,
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
