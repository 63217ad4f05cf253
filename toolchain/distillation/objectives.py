"""The objectives of CLIP-KD (arXiv:2307.12732): what each reads of student and teacher, and what it learns beside them.

A batch goes `DistillationHeads` -> `StudentFeatures` -> (`gathered`, where several processes share a batch) ->
`loss_terms` -> one weighted sum.  An objective whose weight is 0 costs nothing: its features are not made, its
parameters do not exist and its loss is not computed.

    B batch   D student width   E teacher width

Features are one per row and of unit norm, except `raw_...`, which are what the towers return.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolchain.distillation.losses import (
    MAX_LOGIT_SCALE,
    afd_loss,
    clip_loss,
    crd_loss,
    cross_kd_loss,
    fd_loss,
    gd_loss,
    icl_loss,
    widened,
)

OBJECTIVES = ("task", "crd", "fd", "mfd", "gd", "icl", "afd", "cross_kd")
"""In the order in which they are computed, summed and logged."""

_IN_TEACHER_WIDTH = ("fd", "mfd", "gd", "icl", "cross_kd")
_CROSS_SCALED = ("icl", "cross_kd")
_INITIAL_LOG_LOGIT_SCALE = math.log(1 / 0.07)  # CLIP (arXiv:2103.00020), section 2.5


def paper_weight(objective: str, *, width: int = 512) -> float:
    """The weight that makes an objective count as in CLIP-KD's recipes, `width` being the teacher's.

    The recipes say 1 for `task`, `crd`, `icl` and `afd`, 2000 for `fd` and `mfd`, 1e8 for `gd` at a batch of 1024, and
    leave `cross_kd` out.  Their FD and GD are means over the width, GD also falls with the square of the batch; here
    both are sums (see `fd_loss` and `gd_loss`), so that what is 3.9 and 0.186 at D = 512 is right at any batch.  GD's
    belongs to their inverted temperature (`reference_compat`): with the equation's, the term is far larger.
    """
    weights = dict.fromkeys(OBJECTIVES, 1.0) | {"cross_kd": 0.0}
    weights |= {"fd": 2000 / width, "mfd": 2000 / width, "gd": 1e8 / (1024**2 * width)}
    return weights[objective]


class TeacherBatch(NamedTuple):
    """What the teacher says of one batch; rows of unit norm, `logit_scale` the multiplier."""

    image_BE: Tensor
    text_BE: Tensor
    logit_scale: Tensor


class StudentFeatures(NamedTuple):
    """What the objectives read of one batch of the student: rows of unit norm, in float32 at least.

    Where the widths agree and nothing is projected, `image_BE` is the very tensor `image_BD`.
    """

    image_BD: Tensor
    text_BD: Tensor
    image_BE: Tensor | None = None
    text_BE: Tensor | None = None
    masked_image_BE: Tensor | None = None
    fused_image_BD: Tensor | None = None
    fused_text_BD: Tensor | None = None


def gathered(features: StudentFeatures, gather: Callable[[Tensor], Tensor]) -> StudentFeatures:
    """The features of all processes' samples, by one call of `gather`.

    `gather` takes the rows of one process and returns those of all; the gradient is as exact as its own.  It gets all
    features side by side [B, sum of widths] in their common dtype, each tensor once however many names it has.
    """
    distinct = {id(x): x for x in features if x is not None}
    everything = gather(torch.cat(list(distinct.values()), dim=1))
    columns = torch.split(everything, [x.shape[1] for x in distinct.values()], dim=1)
    found = dict(zip(distinct, columns, strict=True))
    return StudentFeatures._make(None if x is None else found[id(x)] for x in features)


class DistillationHeads(nn.Module):
    """The parameters that distillation adds to a student, and that the student ships without.

    Only those that the objectives with a weight read: data-parallel training refuses a parameter without a gradient,
    so a student that trains without a teacher is given no weight but the task's.

    `image_projection`, `text_projection`: Linear(D, E), for all objectives in the teacher's width if D and E differ.
    `image_fusion`, `text_fusion`: Linear(D + E, D), for AFD.
    `log_cross_logit_scale`, `log_fusion_logit_scale`: logarithms of the scales of ICL and cross-KD, and of AFD, from
    ln(1 / 0.07).

    `reference_compat` reproduces what CLIP-KD released: the scales' parameters are themselves the multipliers, 2.66
    instead of 14.3, and unbounded; GD divides by the scales; MFD masks nothing.
    """

    def __init__(
        self, student_width: int, teacher_width: int, weights: Mapping[str, float], *, reference_compat: bool = False
    ) -> None:
        super().__init__()
        assert set(weights) <= set(OBJECTIVES), f"unknown objectives: {sorted(set(weights) - set(OBJECTIVES))}"
        self.objectives = tuple(name for name in OBJECTIVES if weights.get(name, 0.0) != 0)
        self.reference_compat = reference_compat
        projects = self._any_of(_IN_TEACHER_WIDTH) and student_width != teacher_width
        fuses, crosses = self._any_of(("afd",)), self._any_of(_CROSS_SCALED)
        self.image_projection = nn.Linear(student_width, teacher_width) if projects else None
        self.text_projection = nn.Linear(student_width, teacher_width) if projects else None
        self.image_fusion = nn.Linear(student_width + teacher_width, student_width) if fuses else None
        self.text_fusion = nn.Linear(student_width + teacher_width, student_width) if fuses else None
        self.log_cross_logit_scale = nn.Parameter(torch.tensor(_INITIAL_LOG_LOGIT_SCALE)) if crosses else None
        self.log_fusion_logit_scale = nn.Parameter(torch.tensor(_INITIAL_LOG_LOGIT_SCALE)) if fuses else None

    def _any_of(self, names: tuple[str, ...]) -> bool:
        return any(name in self.objectives for name in names)

    @property
    def reads_masked_image(self) -> bool:
        """Whether `forward` needs the features of the masked image: not where the released code ignores its mask."""
        return "mfd" in self.objectives and not self.reference_compat

    @property
    def cross_logit_scale(self) -> Tensor:
        """The multiplier of `icl_loss` and `cross_kd_loss`, in [1, 100].

        The gradient is zero beyond the bounds, so a training loop also clamps the parameter after each step
        (`clamp_parameters_`), as CLIP does with its own.
        """
        return self._multiplier(_present(self.log_cross_logit_scale))

    @property
    def fusion_logit_scale(self) -> Tensor:
        """The multiplier of `afd_loss`, in [1, 100]; its gradient as that of `cross_logit_scale`."""
        return self._multiplier(_present(self.log_fusion_logit_scale))

    def _multiplier(self, log_scale: Tensor) -> Tensor:
        if self.reference_compat:
            return log_scale
        # Not Tensor.clamp: at a bound itself, where `clamp_parameters_` puts the parameter, its gradient is 0, 1/2 or
        # 1 by torch version and overload, and with 0 the parameter never comes back.
        low = log_scale.new_zeros(())
        high = log_scale.new_full((), math.log(MAX_LOGIT_SCALE))  # in the parameter's dtype, so that it can be equal
        return torch.where(log_scale > high, high, torch.where(log_scale < low, low, log_scale)).exp()

    @torch.no_grad()
    def clamp_parameters_(self) -> None:
        """Bring the log scales back into [0, ln 100], where their gradient lives."""
        for log_scale in (self.log_cross_logit_scale, self.log_fusion_logit_scale):
            if log_scale is not None and not self.reference_compat:
                log_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))

    def forward(
        self,
        raw_image_BD: Tensor,
        raw_text_BD: Tensor,
        teacher: TeacherBatch | None,
        raw_masked_image_BD: Tensor | None = None,
    ) -> StudentFeatures:
        """What the objectives with a weight read of a batch; without a teacher, what the task reads.

            u = normalize(x)
            p = normalize(W x + b),   or u when the widths agree
            h = normalize(F [u; V] + b),   V the teacher's feature

        x: the student's RAW features, before normalisation, of the image tower and the text tower.  Their length
        matters in p because of the bias.  `raw_masked_image_BD` is x of an image of which the student saw some
        patches (`masking.masked_image_features`), wanted if `reads_masked_image`.  In float32 at least, also under
        autocast.
        """
        with torch.autocast(raw_image_BD.device.type, enabled=False):
            raw_image_BD, raw_text_BD = widened(raw_image_BD), widened(raw_text_BD)
            features = StudentFeatures(F.normalize(raw_image_BD, dim=-1), F.normalize(raw_text_BD, dim=-1))
            if teacher is None:
                return features
            if self._any_of(_IN_TEACHER_WIDTH):
                features = features._replace(
                    image_BE=_projected(self.image_projection, raw_image_BD, features.image_BD),
                    text_BE=_projected(self.text_projection, raw_text_BD, features.text_BD),
                )
            if self.reads_masked_image:
                raw_BD = widened(_present(raw_masked_image_BD))
                masked_BD = F.normalize(raw_BD, dim=-1)
                features = features._replace(masked_image_BE=_projected(self.image_projection, raw_BD, masked_BD))
            elif "mfd" in self.objectives:
                features = features._replace(masked_image_BE=features.image_BE)
            if "afd" in self.objectives:
                features = features._replace(
                    fused_image_BD=_fused(self.image_fusion, features.image_BD, teacher.image_BE),
                    fused_text_BD=_fused(self.text_fusion, features.text_BD, teacher.text_BE),
                )
            return features


def _projected(projection: nn.Linear | None, raw_BD: Tensor, unit_BD: Tensor) -> Tensor:
    return unit_BD if projection is None else F.normalize(projection(raw_BD), dim=-1)


def _fused(fusion: nn.Linear | None, student_BD: Tensor, teacher_BE: Tensor) -> Tensor:
    assert fusion is not None
    return F.normalize(fusion(torch.cat([student_BD, teacher_BE.to(student_BD.dtype)], dim=-1)), dim=-1)


def loss_terms(
    student: StudentFeatures,
    logit_scale: Tensor,
    teacher: TeacherBatch | None,
    heads: DistillationHeads,
    weights: Mapping[str, float],
) -> dict[str, Tensor]:
    """The unweighted terms with a weight, in the order of `OBJECTIVES`; without a teacher, the task's alone.

    `student` comes from `heads`; `logit_scale`: the student's multiplier.  The heads must have been made for the same
    objectives, or more.
    """
    names = [name for name in OBJECTIVES if weights.get(name, 0.0) != 0 and (teacher is not None or name == "task")]
    return {name: _term(name, student, logit_scale, teacher, heads) for name in names}


def _term(
    name: str, student: StudentFeatures, logit_scale: Tensor, teacher: TeacherBatch | None, heads: DistillationHeads
) -> Tensor:
    if name == "task":
        return clip_loss(student.image_BD, student.text_BD, logit_scale)
    assert teacher is not None
    if name == "crd":
        return crd_loss(student.image_BD, student.text_BD, logit_scale, *teacher)
    if name == "afd":
        return afd_loss(_present(student.fused_image_BD), _present(student.fused_text_BD), heads.fusion_logit_scale)
    projected = _present(student.image_BE), _present(student.text_BE)
    match name:
        case "fd":
            return fd_loss(*projected, teacher.image_BE, teacher.text_BE)
        case "mfd":
            return fd_loss(_present(student.masked_image_BE), projected[1], teacher.image_BE, teacher.text_BE)
        case "gd":
            scales = logit_scale, teacher.logit_scale
            if heads.reference_compat:
                scales = 1 / logit_scale, 1 / teacher.logit_scale
            return gd_loss(*projected, scales[0], teacher.image_BE, teacher.text_BE, scales[1])
        case "icl":
            return icl_loss(*projected, teacher.image_BE, teacher.text_BE, heads.cross_logit_scale)
        case "cross_kd":
            candidates = teacher.image_BE, teacher.text_BE
            return cross_kd_loss(*projected, *candidates, heads.cross_logit_scale, teacher.logit_scale)
    raise AssertionError(name)


def _present(x: Tensor | None) -> Tensor:
    assert x is not None, "the heads were made without this objective, or were given no masked image"
    return x
