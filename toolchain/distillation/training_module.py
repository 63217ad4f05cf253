"""The trained module, which joins the student and the distillation heads, and its optimizer."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toolchain.distillation.batch_norms import freeze_batch_norms, require_statistics, synchronize_batch_norms
from toolchain.distillation.features import Scales, StudentFeatures, TeacherFeatures
from toolchain.distillation.heads import DistillationHeads
from toolchain.distillation.loader import copy_to_device
from toolchain.distillation.losses import MAX_LOGIT_SCALE
from toolchain.distillation.objectives import Objective, select
from toolchain.distillation.teacher_cache import TeacherCache, TeacherCaches
from toolchain.distributed import Processes
from toolchain.models.clip_model import ClipModel
from toolchain.models.patch_masking import kept_patches, masked_image_features, num_patches
from toolchain.models.text_trimming import use_causal_kernels
from toolchain.models.towers import compile_towers, is_vision_transformer
from toolchain.recipe.distill import DistillSpec

_HEADS_WEIGHT_DECAY = 0.01  # for the projections that distillation adds: AdamW's default, as in the released code


class TrainingModule(nn.Module):
    """The student and the distillation heads: everything the optimizer updates and a checkpoint holds."""

    def __init__(
        self,
        student: ClipModel,
        teacher: ClipModel | TeacherCache | TeacherCaches | None,
        spec: DistillSpec,
        processes: Processes,
    ) -> None:
        super().__init__()
        student.probe_fast_paths()
        self.net = student.net
        self.student = student
        weights = spec.loss_weights.model_dump()
        teacher_width = teacher.embed_dim if teacher else student.embed_dim
        self.heads = DistillationHeads(
            student.embed_dim,
            teacher.widths if isinstance(teacher, TeacherCaches) else teacher_width,
            weights if teacher else {},
            reference_compat=spec.reference_compat,
        )
        self._prepare_scales(select(weights, with_teacher=teacher is not None), spec.affinity_logit_scale)
        self._mask_ratio = spec.mask_ratio if self.heads.reads_masked_image else None
        dropout: Any = getattr(self.net.visual, "patch_dropout", None)
        self._patch_dropout = getattr(dropout, "prob", None)  # open_clip draws it from torch; we hash it
        self.to(processes.device)
        self._freezes_batch_norms = spec.batch_norm == "frozen"
        if self._freezes_batch_norms:
            require_statistics(self.net)
        elif spec.batch_norm == "all_processes":
            synchronize_batch_norms(self.net, processes)
        if processes.device.type == "cuda":
            use_causal_kernels(self.net)
        if spec.compile:
            compile_towers(self.net)

    @property
    def _logit_bias(self) -> nn.Parameter | None:
        """The bias of a sigmoid student; None for a softmax student."""
        bias: nn.Parameter | None = getattr(self.net, "logit_bias", None)
        return bias

    def _prepare_scales(self, objectives: Mapping[str, Objective], affinity_logit_scale: float) -> None:
        """Let the student's scale and bias be trained if an objective reads them.

        Data-parallel training refuses parameters without a gradient.  Affinity mimicking trains no scale; if nothing
        else does, the student gets the scale of that loss, as in TinyCLIP, unless it has its teacher's.
        """
        scale: Any = self.net.logit_scale
        scale.requires_grad_(any(objective.reads_logit_scale for objective in objectives.values()))
        if self._logit_bias is not None:
            self._logit_bias.requires_grad_(any(objective.reads_logit_bias for objective in objectives.values()))
        if "affinity" in objectives and not scale.requires_grad and not self.student.has_teachers_text:
            with torch.no_grad():
                scale.fill_(math.log(affinity_logit_scale))

    def train(self, mode: bool = True) -> "TrainingModule":
        """Set training or evaluation mode; frozen batch norms stay in evaluation mode."""
        super().train(mode)
        if self._freezes_batch_norms:
            freeze_batch_norms(self.net)
        return self

    def forward(
        self,
        pixel_values: Tensor,
        input_ids_bT: Tensor,
        teacher: TeacherFeatures | None,
        shown_bK: Tensor | None,
        kept_bK: Tensor | None,
    ) -> tuple[StudentFeatures, Scales]:
        """Return one rank's rows of the features that the objectives read, and the multipliers."""
        net: Any = self.net
        encode = self.student.encode_image
        if kept_bK is None:
            image_bD = encode(pixel_values)
        else:
            image_bD = masked_image_features(net.visual, pixel_values, kept_bK, encode)
        masked_bD = None
        if shown_bK is not None:
            masked_bD = masked_image_features(net.visual, pixel_values, shown_bK, encode)
        if self.student.has_teachers_text:
            assert teacher is not None
            text_bD = teacher.text_BE
        else:
            text_bD = self.student.encode_text(input_ids_bT)
        features = self.heads(image_bD, text_bD, teacher, masked_bD)
        # A copy, because the log reads it after the step has changed the parameter.
        bias = None if self._logit_bias is None else self._logit_bias.reshape(()).clone()
        return features, self.heads.scales(net.logit_scale.exp().reshape(()), bias)  # some models keep vectors of one

    def masks(self, seed: int, sample_b: NDArray[np.int64], step: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the patches that MFD shows and those that the tower's own patch dropout keeps, [b, K] or None each.

        They are hashed from seed, sample and step, so they do not depend on how a batch is split over ranks.
        """
        visual: Any = self.net.visual

        def draw_patches(ratio: float | None, draw: int) -> Tensor | None:
            if not ratio:
                return None
            kept_bK = kept_patches(seed, sample_b, draw, num_patches=num_patches(visual), mask_ratio=ratio)
            return copy_to_device(kept_bK, self.net.logit_scale.device)  # type: ignore[arg-type]

        return draw_patches(self._mask_ratio, 2 * step), draw_patches(self._patch_dropout, 2 * step + 1)

    @torch.no_grad()
    def clamp_parameters_(self) -> None:
        if self._logit_bias is None:  # SigLIP does not bound the scale of sigmoids: its models have 117
            self.net.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))  # type: ignore[operator]
        self.heads.clamp_parameters_()


def make_optimizer(trainee: TrainingModule, spec: DistillSpec) -> torch.optim.AdamW:
    """Return AdamW with CLIP-KD's parameter groups.

    The student's matrices decay; its vectors, biases and scales do not.  The heads' projections decay by AdamW's own
    default.  Transformers have faster moments than convolutional towers (CLIP-KD's scripts, from CLIP).
    """
    named = [(name, p) for name, p in trainee.net.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim >= 2 and "bias" not in name]  # Swin has tables of biases
    free = [p for name, p in named if p.ndim < 2 or "bias" in name]
    heads = list(trainee.heads.parameters())
    vectors_decay = _HEADS_WEIGHT_DECAY if spec.reference_compat else 0.0
    groups = [
        {"params": decayed, "weight_decay": spec.weight_decay},
        {"params": free, "weight_decay": 0.0},
        {"params": [p for p in heads if p.ndim >= 2], "weight_decay": _HEADS_WEIGHT_DECAY},
        {"params": [p for p in heads if p.ndim < 2], "weight_decay": vectors_decay},
    ]
    transformer = is_vision_transformer(trainee.net.visual)  # type: ignore[arg-type]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=spec.lr,
        betas=(0.9, 0.98 if transformer else 0.999),
        eps=1e-6 if transformer else 1e-8,
        fused=True,
    )


def clip_gradients(trainee: TrainingModule, max_norm: float | None) -> Tensor:
    """Scale the gradients down to a total norm of at most `max_norm`; return the norm before that."""
    gradients = [p.grad for p in trainee.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(trainee.parameters(), max_norm, norm)
    return norm
