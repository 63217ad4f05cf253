"""Compute a frozen teacher's features of a batch, or read them from a cache."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.distillation.features import TeacherFeatures
from toolchain.distillation.loader import PreparedBatch
from toolchain.distillation.teacher_cache import TeacherCache, TeacherCaches
from toolchain.errors import ArtifactError
from toolchain.models.clip_model import ClipModel
from toolchain.models.onednn import on_onednn
from toolchain.models.text_trimming import use_causal_kernels
from toolchain.models.tf32 import float32_products
from toolchain.models.towers import compile_towers
from toolchain.recipe.distill import DistillSpec
from toolchain.recipe.section import Precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LiveTeacher:
    """A frozen teacher that runs on each batch."""

    model: ClipModel
    logit_scale: Tensor
    dtype: torch.dtype
    compiled: bool = False
    tf32: bool = False
    logit_bias: Tensor | None = None
    """None: a softmax model."""

    @torch.no_grad()  # not inference_mode: the objectives save these features for their backward pass
    def features(self, batch: PreparedBatch) -> TeacherFeatures:
        """Compute the features of a batch."""
        assert batch.teacher_pixels is not None
        assert batch.teacher_ids is not None
        image_bE = self.image_features(batch.teacher_pixels)
        return TeacherFeatures(image_bE, self.text_features(batch.teacher_ids), self.logit_scale, self.logit_bias)

    @property
    def non_finite_advice(self) -> str:
        """Return what to do if features are not finite; the weights are, or they would not have been loaded."""
        return non_finite_advice(self.dtype == torch.float32)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Return image features [B, E] of uint8 pixels: float32, rows of unit norm."""
        with on_onednn(pixels.device, compiled=self.compiled), float32_products(tf32=self.tf32):
            raw_BE = self.model.encode_image(self.model.normalise(pixels).to(self.dtype))
        return nn.functional.normalize(raw_BE.float(), dim=-1)

    def text_features(self, input_ids_BT: Tensor) -> Tensor:
        """Return text features [B, E]: float32, rows of unit norm."""
        with on_onednn(input_ids_BT.device, compiled=self.compiled), float32_products(tf32=self.tf32):
            raw_BE = self.model.encode_text(input_ids_BT)
        return nn.functional.normalize(raw_BE.float(), dim=-1)


@dataclass(frozen=True)
class CachedTeacher:
    """A frozen teacher, or several, whose features were read from a cache when the batch was prepared."""

    logit_scale: Tensor
    logit_bias: Tensor | None = None
    widths: tuple[int, ...] = ()
    """As in `TeacherFeatures`."""

    def features(self, batch: PreparedBatch) -> TeacherFeatures:
        """Return the stored features of a batch."""
        assert batch.teacher_features is not None
        return TeacherFeatures(*batch.teacher_features, self.logit_scale, self.logit_bias, self.widths)


def non_finite_advice(is_float32: bool) -> str:
    """Return what to do about a teacher whose features are not finite."""
    if is_float32:
        return (
            "The teacher overflows in fp32 on these inputs: look at them, and check that its weights are the right ones"
        )
    return "The teacher overflows in its precision. Set distill.teacher_precision: fp32"


def open_teacher(
    teacher: ClipModel | TeacherCache | TeacherCaches, spec: DistillSpec, device: torch.device
) -> LiveTeacher | CachedTeacher:
    """Return the object that provides the teacher's features during training.

    Raises:
        ArtifactError: its logit_scale or logit_bias is not finite, or its cache lacks the logit_bias that is needed.
    """
    if isinstance(teacher, ClipModel):
        return live_teacher(teacher, spec.teacher_precision, device, compiled=spec.compile, tf32=spec.tf32)
    members = teacher.members if isinstance(teacher, TeacherCaches) else (teacher,)
    biases = [member.logit_bias for member in members]
    if spec.loss_weights.sigmoid_kd and None in biases:
        raise ArtifactError(
            f"{members[biases.index(None)].folder}: distill.loss_weights.sigmoid_kd needs the teacher's logit_bias, "
            "which this teacher cache lacks: it was made by an earlier version. Delete it and run the command again to "
            "rebuild it"
        )
    scale = torch.tensor([member.logit_scale for member in members], device=device)
    bias = None if None in biases else torch.tensor(biases, device=device)
    if isinstance(teacher, TeacherCaches):
        return CachedTeacher(scale, bias, teacher.widths)
    return CachedTeacher(scale[0], None if bias is None else bias[0])


def live_teacher(
    teacher: ClipModel, precision: Precision, device: torch.device, *, compiled: bool = False, tf32: bool = False
) -> LiveTeacher:
    """Return the teacher frozen, with its weights in `precision`; its features are float32.

    Raises:
        ArtifactError: its logit_scale or logit_bias is not finite.
    """
    logit_scale = teacher.logit_scale.detach().float().to(device)  # before it is rounded
    if not logit_scale.isfinite():
        raise ArtifactError(
            f"teacher {teacher.name}: the exponential of its logit_scale is not finite; use other weights"
        )
    logit_bias = None if teacher.logit_bias is None else teacher.logit_bias.detach().float().to(device)
    if logit_bias is not None and not logit_bias.isfinite():
        raise ArtifactError(f"teacher {teacher.name}: its logit_bias is not finite; use other weights")
    teacher.probe_fast_paths()  # before it is compiled: the probes' own shapes would be compiled too
    net: Any = teacher.net.eval().requires_grad_(False).to(device, DTYPES[precision])
    if device.type == "cuda":
        use_causal_kernels(net)
    if compiled:
        compile_towers(net)
    return LiveTeacher(teacher, logit_scale, DTYPES[precision], compiled, tf32, logit_bias)
