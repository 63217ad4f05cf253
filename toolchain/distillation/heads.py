"""The learnt layers and scales that distillation adds to a student.

Features are one per row and of unit norm, except `raw_...`, the output of the towers.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolchain.distillation.features import Scales, StudentFeatures, TeacherFeatures
from toolchain.distillation.losses import MAX_LOGIT_SCALE, widen
from toolchain.distillation.objectives import OBJECTIVES, select

_INITIAL_LOG_LOGIT_SCALE = math.log(1 / 0.07)  # CLIP (arXiv:2103.00020), section 2.5


class DistillationHeads(nn.Module):
    """The parameters that distillation adds to a student; they are not part of the saved student.

    Only parameters that the weighted objectives read exist, because data-parallel training refuses a parameter without
    a gradient.  For a student that trains without a teacher, pass no weight except the task's.

    `image_projection`, `text_projection`: Linear(D, E), for all objectives in the teacher's width if D and E differ.
    `image_fusion`, `text_fusion`: Linear(D + E, D), for AFD.
    For several teachers, `teacher_width` has the width of each, and E is their sum: the projections to their widths,
    one layer for each, are the rows of one matrix, and exist even if a width is D.  A fusion reads all teachers.
    `log_cross_logit_scale`, `log_fusion_logit_scale`: logarithms of the scales of ICL and cross-KD, and of AFD, from
    ln(1 / 0.07).

    `reference_compat` reproduces CLIP-KD's released code: the scale parameters are themselves the multipliers, 2.66
    instead of 14.3, and unbounded; GD divides by the scales; MFD masks nothing.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int | tuple[int, ...],
        weights: Mapping[str, float],
        *,
        reference_compat: bool = False,
    ) -> None:
        super().__init__()
        assert set(weights) <= set(OBJECTIVES), f"unknown objectives: {sorted(set(weights) - set(OBJECTIVES))}"
        objectives = select(weights).values()
        self.reference_compat = reference_compat
        self._in_teacher_width = any(objective.in_teacher_width for objective in objectives)
        self._masks_image = any(objective.on_whole_image for objective in objectives)
        self._widths = (teacher_width,) if isinstance(teacher_width, int) else teacher_width
        projects = self._in_teacher_width and self._widths != (student_width,)
        teacher_width = sum(self._widths)
        fuses = any(objective.fuses for objective in objectives)
        crosses = any(objective.reads_cross_scale for objective in objectives)
        self.image_projection = nn.Linear(student_width, teacher_width) if projects else None
        self.text_projection = nn.Linear(student_width, teacher_width) if projects else None
        self.image_fusion = nn.Linear(student_width + teacher_width, student_width) if fuses else None
        self.text_fusion = nn.Linear(student_width + teacher_width, student_width) if fuses else None
        self.log_cross_logit_scale = nn.Parameter(torch.tensor(_INITIAL_LOG_LOGIT_SCALE)) if crosses else None
        self.log_fusion_logit_scale = nn.Parameter(torch.tensor(_INITIAL_LOG_LOGIT_SCALE)) if fuses else None

    @property
    def reads_masked_image(self) -> bool:
        """True if `forward` needs the features of the masked image; the released code ignores its mask."""
        return self._masks_image and not self.reference_compat

    @property
    def cross_logit_scale(self) -> Tensor:
        """The multiplier of `icl_loss` and `cross_kd_loss`, in [1, 100].

        The gradient is zero beyond the bounds, so a training loop also clamps the parameter after each step
        (`clamp_parameters_`), as CLIP does with its own.
        """
        return self._multiplier(_require(self.log_cross_logit_scale))

    @property
    def fusion_logit_scale(self) -> Tensor:
        """The multiplier of `afd_loss`, in [1, 100]; its gradient is like that of `cross_logit_scale`."""
        return self._multiplier(_require(self.log_fusion_logit_scale))

    def _multiplier(self, log_scale: Tensor) -> Tensor:
        if self.reference_compat:
            return log_scale.clone()  # the log reads it after the step has changed the parameter
        # Not Tensor.clamp: at a bound, where `clamp_parameters_` puts the parameter, its gradient is 0, 1/2 or 1
        # depending on torch version and overload, and with 0 the parameter would never leave the bound.
        low = log_scale.new_zeros(())
        high = log_scale.new_full((), math.log(MAX_LOGIT_SCALE))  # in the parameter's dtype, so they can be equal
        return torch.where(log_scale > high, high, torch.where(log_scale < low, low, log_scale)).exp()

    @torch.no_grad()
    def clamp_parameters_(self) -> None:
        """Clamp the log scales to [0, ln 100], the range in which they have a gradient."""
        for log_scale in (self.log_cross_logit_scale, self.log_fusion_logit_scale):
            if log_scale is not None and not self.reference_compat:
                log_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))

    def scales(self, logit_scale: Tensor, logit_bias: Tensor | None = None) -> Scales:
        """Return the multipliers, given the student's own; a sigmoid student has a bias too."""
        return Scales(
            logit_scale,
            None if self.log_cross_logit_scale is None else self.cross_logit_scale,
            None if self.log_fusion_logit_scale is None else self.fusion_logit_scale,
            logit_bias,
        )

    def forward(
        self,
        raw_image_BD: Tensor,
        raw_text_BD: Tensor,
        teacher: TeacherFeatures | None,
        raw_masked_image_BD: Tensor | None = None,
    ) -> StudentFeatures:
        """Return the features that the weighted objectives read; without a teacher, those that the task loss reads.

            u = normalize(x)
            p = normalize(W x + b),   or u when the widths agree
            h = normalize(F [u; V] + b),   V the teacher's feature

        x: the student's RAW features, before normalization, of the image tower and the text tower.  Their length
        matters in p because of the bias.  `raw_masked_image_BD` is x of an image of which the student saw only some
        patches (`masked_image_features`); required if `reads_masked_image`.  Computed in float32 or wider, also
        under autocast.
        """
        with torch.autocast(raw_image_BD.device.type, enabled=False):
            raw_image_BD, raw_text_BD = widen(raw_image_BD), widen(raw_text_BD)
            features = StudentFeatures(F.normalize(raw_image_BD, dim=-1), F.normalize(raw_text_BD, dim=-1))
            if teacher is None:
                return features
            if self._in_teacher_width:
                features = features._replace(
                    image_BE=self._project(self.image_projection, raw_image_BD, features.image_BD),
                    text_BE=self._project(self.text_projection, raw_text_BD, features.text_BD),
                )
            if self.reads_masked_image:
                raw_BD = widen(_require(raw_masked_image_BD))
                masked_BD = F.normalize(raw_BD, dim=-1)
                features = features._replace(masked_image_BE=self._project(self.image_projection, raw_BD, masked_BD))
            elif self._masks_image:
                features = features._replace(masked_image_BE=features.image_BE)
            if self.image_fusion is not None and self.text_fusion is not None:
                features = features._replace(
                    fused_image_BD=_fuse(self.image_fusion, features.image_BD, teacher.image_BE),
                    fused_text_BD=_fuse(self.text_fusion, features.text_BD, teacher.text_BE),
                )
            return features

    def _project(self, projection: nn.Linear | None, raw_BD: Tensor, unit_BD: Tensor) -> Tensor:
        if projection is None:
            return unit_BD
        of_teachers = projection(raw_BD).split(self._widths, dim=-1)
        return torch.cat([F.normalize(x_BE, dim=-1) for x_BE in of_teachers], dim=-1)


def _fuse(fusion: nn.Linear, student_BD: Tensor, teacher_BE: Tensor) -> Tensor:
    return F.normalize(fusion(torch.cat([student_BD, teacher_BE.to(student_BD.dtype)], dim=-1)), dim=-1)


def _require(x: Tensor | None) -> Tensor:
    assert x is not None, "the heads were made without this objective, or were given no masked image"
    return x
