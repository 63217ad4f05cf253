"""Train a student against a frozen teacher, or alone.

The loop is one line of the paper after another: batch -> student features -> losses -> one weighted sum -> step.  The
teacher never runs inside it: it sees every stored view once, beforehand, and its features are looked up.

    B batch   N samples   V views   K characters   P templates   E teacher width
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from toolchain.data import Batch, GlyphBatches
from toolchain.errors import ClipkdError
from toolchain.glyphs import TEMPLATES
from toolchain.losses import MAX_LOGIT_SCALE
from toolchain.models import ClipModel, save_model, unit_image_features, unit_text_features
from toolchain.objectives import DistillationHeads, TeacherBatch, loss_terms
from toolchain.recipe import DistillSpec

_CHECKPOINT_EVERY_S = 30.0
_CHECKPOINT, _LOG, _TEACHER_FEATURES = "checkpoint.pt", "train.jsonl", "teacher_features.npz"


class Progress(Protocol):
    """How a long stage says where it is; `clipkd.py` draws it."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None: ...


@dataclass(frozen=True)
class TeacherFeatures:
    """What a frozen teacher says of every stored view and every caption, rows of unit norm."""

    image_VNE: Tensor
    text_PKE: Tensor
    logit_scale: Tensor

    def of(self, batch: Batch) -> TeacherBatch:
        """Look a batch up."""
        image_BE = self.image_VNE[batch.view, torch.from_numpy(batch.sample_B)]
        text_BE = self.text_PKE[torch.from_numpy(batch.template_B), torch.from_numpy(batch.character_B)]
        return TeacherBatch(image_BE, text_BE, self.logit_scale)


@torch.inference_mode()
def teacher_features(teacher: ClipModel, data: GlyphBatches, num_views: int, progress: Progress) -> TeacherFeatures:
    """Run the teacher once over `num_views` views of every sample and over every caption."""
    num_samples, chunk = len(data.samples.character_N), 256
    sample_N = np.arange(num_samples)
    image_VNE = torch.empty(num_views, num_samples, teacher.embed_dim)
    for view in range(num_views):
        for start in range(0, num_samples, chunk):
            pixels_B3HH = data.view_of(sample_N[start : start + chunk], view).pixels_B3HH
            features_BE = unit_image_features(teacher.net, teacher.normalise(pixels_B3HH))
            image_VNE[view, start : start + chunk] = features_BE
            progress("teacher features", view * num_samples + start + len(features_BE), num_views * num_samples)
    ids_PKT = tokenized_captions(teacher, data)
    chunks = torch.split(ids_PKT.flatten(0, 1), chunk)
    text = torch.cat([unit_text_features(teacher.net, ids_BT) for ids_BT in chunks])
    return TeacherFeatures(image_VNE, text.view(*ids_PKT.shape[:2], -1), teacher.logit_scale.detach())


def distil(
    spec: DistillSpec,
    student: ClipModel,
    teacher: ClipModel | None,
    data: GlyphBatches,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train `student` in place and save it in `folder`; returns what the manifest should say.

    An interrupted call leaves its checkpoint in `folder`, and the same call continues from it.

    Raises:
        ClipkdError: the loss became NaN or infinite.
    """
    started = time.monotonic()
    features = _stored_teacher_features(teacher, data, spec.steps, folder, progress) if teacher else None
    teacher_s = time.monotonic() - started
    weights = spec.loss_weights.model_dump()
    teacher_width = teacher.embed_dim if teacher else student.embed_dim
    heads = DistillationHeads(student.embed_dim, teacher_width, weights if teacher else {})
    optimizer = _optimizer(student.net, heads, spec)
    state = _State(student.net, heads, optimizer, folder)
    step, before_s = state.resume()
    started, saved_at = time.monotonic(), time.monotonic()
    student.net.train()
    ids_PKT = tokenized_captions(student, data)
    with (folder / _LOG).open("a", encoding="utf-8") as log:
        while step < spec.steps:
            step_started = time.monotonic()
            batch = data.batch(step)
            input_ids_BT = ids_PKT[torch.from_numpy(batch.template_B), torch.from_numpy(batch.character_B)]
            image_BD: Tensor = student.net.encode_image(student.normalise(batch.pixels_B3HH))  # type: ignore[operator]
            text_BD: Tensor = student.net.encode_text(input_ids_BT)  # type: ignore[operator]
            teacher_batch = features.of(batch) if features else None
            features_of_student = heads(image_BD, text_BD, teacher_batch)
            terms = loss_terms(features_of_student, student.logit_scale, teacher_batch, heads, weights)
            loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
            if not math.isfinite(loss.item()):
                values = {name: term.item() for name, term in terms.items()}
                raise ClipkdError(
                    f"{folder}: the loss is {loss.item()} at step {step} (terms {values}; samples "
                    f"{batch.sample_B[:8].tolist()} and others). The last checkpoint is intact; lower distill.lr"
                )
            lr = learning_rate(spec, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward untyped
            optimizer.step()
            with torch.no_grad():
                student.net.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))  # type: ignore[operator]
            heads.clamp_parameters_()
            rate = spec.batch_size / (time.monotonic() - step_started)
            row: dict[str, Any] = {
                "step": step,
                "loss": loss.item(),
                "lr": lr,
                "logit_scale": student.logit_scale.item(),
            }
            row["terms"] = {n: {"unweighted": t.item(), "weighted": weights[n] * t.item()} for n, t in terms.items()}
            log.write(json.dumps(row | {"images_per_s": round(rate, 1)}) + "\n")
            step += 1
            progress("training", step, spec.steps, f"loss {loss.item():.3f}  {rate:.0f} images/s")
            if time.monotonic() - saved_at > _CHECKPOINT_EVERY_S:
                log.flush()
                state.save(step, before_s + time.monotonic() - started)
                saved_at = time.monotonic()
    student.net.eval()
    save_model(student, folder)
    if features is not None:
        torch.save(heads.state_dict(), folder / "heads.pt")
    (folder / _CHECKPOINT).unlink(missing_ok=True)
    (folder / _TEACHER_FEATURES).unlink(missing_ok=True)
    train_s = teacher_s + before_s + time.monotonic() - started
    return {"train_s": round(train_s, 1), "teacher_s": round(teacher_s, 1), "steps": spec.steps}


def learning_rate(spec: DistillSpec, step: int) -> float:
    """Linear warm-up, then half a cosine down to 0 (CLIP-KD's schedule)."""
    if step < spec.warmup:
        return spec.lr * (step + 1) / spec.warmup
    done = (step - spec.warmup) / max(1, spec.steps - spec.warmup)
    return spec.lr * 0.5 * (1 + math.cos(math.pi * done))


def _optimizer(net: nn.Module, heads: DistillationHeads, spec: DistillSpec) -> torch.optim.AdamW:
    """AdamW with CLIP-KD's groups: matrices decay, vectors and scales do not; betas by the kind of image tower."""
    decayed = [p for module in (net, heads) for p in module.parameters() if p.ndim >= 2]
    free = [p for module in (net, heads) for p in module.parameters() if p.ndim < 2]
    is_vit = isinstance(net.visual, VisionTransformer)
    groups = [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=spec.lr, betas=(0.9, 0.98 if is_vit else 0.999), eps=1e-6 if is_vit else 1e-8, fused=True
    )


def tokenized_captions(student: ClipModel, data: GlyphBatches) -> Tensor:
    """input_ids [P, K, T] of every caption training can show."""
    captions = [template.format(name) for template in TEMPLATES for name in data.samples.names]
    return student.tokenize(captions).view(len(TEMPLATES), len(data.samples.names), -1)


def _stored_teacher_features(
    teacher: ClipModel, data: GlyphBatches, steps: int, folder: Path, progress: Progress
) -> TeacherFeatures:
    path = folder / _TEACHER_FEATURES
    if path.exists():  # left by an interrupted call of the same stage
        with np.load(path) as saved:
            return TeacherFeatures(*(torch.from_numpy(saved[name]) for name in ("image", "text", "logit_scale")))
    num_views = min(data.views, math.ceil(steps / data.steps_per_epoch))
    features = teacher_features(teacher, data, num_views, progress)
    with _replacing(path) as partial, partial.open("wb") as file:
        np.savez(
            file,
            image=features.image_VNE.numpy(),
            text=features.text_PKE.numpy(),
            logit_scale=features.logit_scale.numpy(),
        )
    return features


@dataclass(frozen=True)
class _State:
    """Everything a resumed run needs; batches need nothing, being functions of the step."""

    net: nn.Module
    heads: DistillationHeads
    optimizer: torch.optim.Optimizer
    folder: Path

    def save(self, step: int, elapsed_s: float) -> None:
        parts = {
            "net": self.net.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with _replacing(self.folder / _CHECKPOINT) as partial:
            torch.save(parts | {"step": step, "elapsed_s": elapsed_s}, partial)

    def resume(self) -> tuple[int, float]:
        """The step to continue with and the seconds already spent; rows logged after the checkpoint are dropped."""
        path, log = self.folder / _CHECKPOINT, self.folder / _LOG
        if not path.exists():
            log.unlink(missing_ok=True)
            return 0, 0.0
        saved = torch.load(path, weights_only=True)
        self.net.load_state_dict(saved["net"])
        self.heads.load_state_dict(saved["heads"])
        self.optimizer.load_state_dict(saved["optimizer"])
        rows = log.read_text(encoding="utf-8").splitlines()[: saved["step"]]
        log.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
        return int(saved["step"]), float(saved["elapsed_s"])


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling that takes the path's place only when it is complete."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)
