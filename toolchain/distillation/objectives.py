"""The objectives of CLIP-KD (arXiv:2307.12732) in one table, and the learnt heads that they need.

A batch passes `DistillationHeads` -> `BatchFeatures` -> `gather_features` over the ranks -> `weighted_loss`.  An
objective whose weight is 0 costs nothing: its features are not computed, its parameters do not exist and its loss is
not computed.

To add an objective, write its definition in losses.py, a row in `OBJECTIVES` that says how to compute it in blocks, and
its weight in recipe/distill.py, which also lists the objectives that need pairs of image and caption.

Features are one per row and of unit norm, except `raw_...`, the output of the towers.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolchain.distillation.blockwise_losses import Rows, Similarities, contrast, match_gradients
from toolchain.distillation.losses import MAX_LOGIT_SCALE, fd_loss, widen
from toolchain.distributed import ALONE, Processes

_INITIAL_LOG_LOGIT_SCALE = math.log(1 / 0.07)  # CLIP (arXiv:2103.00020), section 2.5


class TeacherFeatures(NamedTuple):
    """The teacher's features of one batch: rows of unit norm, and `logit_scale`, the multiplier."""

    image_BE: Tensor
    text_BE: Tensor
    logit_scale: Tensor


class StudentFeatures(NamedTuple):
    """The student's features of one batch that objectives read: rows of unit norm, in float32 or wider.

    If the widths agree, nothing is projected and `image_BE` is the same tensor as `image_BD`.
    """

    image_BD: Tensor
    text_BD: Tensor
    image_BE: Tensor | None = None
    text_BE: Tensor | None = None
    masked_image_BE: Tensor | None = None
    fused_image_BD: Tensor | None = None
    fused_text_BD: Tensor | None = None


class BatchFeatures(NamedTuple):
    """The features of one batch, or of one rank's rows of it; without a teacher, the student's alone."""

    student: StudentFeatures
    teacher: TeacherFeatures | None


def gather_features(features: BatchFeatures, gather: Callable[[Tensor], Tensor]) -> BatchFeatures:
    """Return the features of all ranks' samples; the student's with one call of `gather`.

    `gather` takes the rows of one rank and returns those of all ranks; the gradient is as exact as that of `gather`.
    It receives all of the student's features concatenated [B, sum of widths] in their common dtype, each distinct
    tensor once.
    """
    distinct = {id(x): x for x in features.student if x is not None}
    everything = gather(torch.cat(list(distinct.values()), dim=1))
    columns = torch.split(everything, [x.shape[1] for x in distinct.values()], dim=1)
    found = dict(zip(distinct, columns, strict=True))
    student = StudentFeatures._make(None if x is None else found[id(x)] for x in features.student)
    teacher = features.teacher
    if teacher is not None:
        teacher = TeacherFeatures(gather(teacher.image_BE), gather(teacher.text_BE), teacher.logit_scale)
    return BatchFeatures(student, teacher)


@dataclass(frozen=True)
class LossInputs:
    """Everything a loss may read of one batch.  Reading features that the heads did not make raises AssertionError."""

    own: BatchFeatures
    """The rank's own rows [b, D], the anchors of its losses."""

    everyone: BatchFeatures
    """The rows of all ranks [B, D], the candidates."""

    logit_scale: Tensor
    """The student's multiplier."""

    heads: "DistillationHeads"
    processes: Processes
    memory_mb: float
    """Memory for the similarities of a block of rows."""

    @property
    def rows(self) -> Rows:
        return Rows(self.processes.rank * len(self.own.student.image_BD), self.memory_mb)

    @property
    def student(self) -> tuple[Similarities, Similarities]:
        """Image to text and text to image, in the student's own width."""
        own, everyone = self.own.student, self.everyone.student
        return _both_directions((own.image_BD, own.text_BD), (everyone.image_BD, everyone.text_BD), self.logit_scale)

    @property
    def cross(self) -> tuple[Similarities, Similarities]:
        """The student's images to the teacher's texts and its texts to the teacher's images, in the teacher's width."""
        return _both_directions(self.projected, _teacher_pair(self.everyone), self.heads.cross_logit_scale)

    @property
    def fused(self) -> tuple[Similarities, Similarities]:
        """Images fused from both models to fused texts, and the reverse."""
        own, everyone = (
            (_require(x.student.fused_image_BD), _require(x.student.fused_text_BD)) for x in (self.own, self.everyone)
        )
        return _both_directions(own, everyone, self.heads.fusion_logit_scale)

    @property
    def teacher(self) -> tuple[Similarities, Similarities]:
        """The teacher's image to text and text to image."""
        return _both_directions(_teacher_pair(self.own), _teacher_pair(self.everyone), self.teacher_logit_scale)

    @property
    def projected(self) -> tuple[Tensor, Tensor]:
        """The rank's image and text features in the teacher's width."""
        return _require(self.own.student.image_BE), _require(self.own.student.text_BE)

    @property
    def masked(self) -> tuple[Tensor, Tensor]:
        """Like `projected`, with the image masked."""
        return _require(self.own.student.masked_image_BE), _require(self.own.student.text_BE)

    @property
    def targets(self) -> tuple[Tensor, Tensor]:
        """The teacher's image and text features of the rank's rows."""
        return _teacher_pair(self.own)

    @property
    def teacher_logit_scale(self) -> Tensor:
        assert self.own.teacher is not None
        return self.own.teacher.logit_scale


def _both_directions(
    own: tuple[Tensor, Tensor], everyone: tuple[Tensor, Tensor], logit_scale: Tensor
) -> tuple[Similarities, Similarities]:
    """Return own images with everyone's texts, and own texts with everyone's images."""
    return Similarities(own[0], everyone[1], logit_scale), Similarities(own[1], everyone[0], logit_scale)


def _teacher_pair(features: BatchFeatures) -> tuple[Tensor, Tensor]:
    assert features.teacher is not None
    return features.teacher.image_BE, features.teacher.text_BE


def _distill_gradients(x: LossInputs) -> Tensor:
    """Return gradient distillation; `reference_compat` inverts the scales, as the released code does."""
    everyone = x.everyone.student
    scales = x.logit_scale, x.teacher_logit_scale
    if x.heads.reference_compat:
        scales = 1 / scales[0], 1 / scales[1]
    return match_gradients(
        _both_directions(x.projected, (_require(everyone.image_BE), _require(everyone.text_BE)), scales[0]),
        _both_directions(x.targets, _teacher_pair(x.everyone), scales[1]),
        x.rows,
        x.processes.sum,
    )


@dataclass(frozen=True)
class Contrast:
    """A loss that compares each anchor with all candidates; losses of the same similarities share their sweep."""

    similarities: Literal["student", "cross", "fused"]
    """The property of `LossInputs` with both directions."""

    target: Literal["pair", "teacher"]
    """Find the own pair among the candidates (cross entropy), or match the teacher's distribution over them (KL)."""


@dataclass(frozen=True)
class Objective:
    """One objective: its loss, and the inputs that the loss reads."""

    loss: Contrast | Callable[[LossInputs], Tensor]
    """How the loss is computed, over the rank's rows; losses.py defines it."""

    paper_weight: float
    """The weight in CLIP-KD's recipes, in their units; 0 if they do not use the objective."""

    is_mean_over_width: bool = False
    """True if the paper's term is a mean over the width and ours a sum: divide the weight by the width."""

    needs_teacher: bool = True
    in_teacher_width: bool = False
    """True if it reads features in the teacher's width; a projection computes them if the widths differ."""

    reads_logit_scale: bool = False
    """True if it trains the student's own scale."""

    reads_cross_scale: bool = False
    """True if it needs the learnt scale of similarities between the two models."""

    fuses: bool = False
    """True if it needs learnt fusions of both models' features, and a scale for them."""

    on_whole_image: str | None = None
    """Set if it shows the student only some patches: the objective with the same loss on the whole image."""


OBJECTIVES: dict[str, Objective] = {
    "task": Objective(
        Contrast("student", "pair"),
        paper_weight=1,
        needs_teacher=False,
        reads_logit_scale=True,
    ),
    "crd": Objective(
        Contrast("student", "teacher"),
        paper_weight=1,
        reads_logit_scale=True,
    ),
    "fd": Objective(
        lambda x: fd_loss(*x.projected, *x.targets),
        paper_weight=2000,
        is_mean_over_width=True,
        in_teacher_width=True,
    ),
    "mfd": Objective(
        lambda x: fd_loss(*x.masked, *x.targets),
        paper_weight=2000,
        is_mean_over_width=True,
        in_teacher_width=True,
        on_whole_image="fd",
    ),
    "gd": Objective(
        _distill_gradients,
        paper_weight=1e8 / 1024**2,  # a mean over a batch of 1024, squared
        is_mean_over_width=True,
        in_teacher_width=True,
        reads_logit_scale=True,
    ),
    "icl": Objective(
        Contrast("cross", "pair"),
        paper_weight=1,
        in_teacher_width=True,
        reads_cross_scale=True,
    ),
    "afd": Objective(
        Contrast("fused", "pair"),
        paper_weight=1,
        fuses=True,
    ),
    "cross_kd": Objective(
        Contrast("cross", "teacher"),
        paper_weight=0,
        in_teacher_width=True,
        reads_cross_scale=True,
    ),
}
"""The objectives, in the order in which they are computed, summed and logged."""


def select(weights: Mapping[str, float], *, with_teacher: bool = True) -> dict[str, Objective]:
    """Return the weighted objectives in the order of `OBJECTIVES`; without a teacher, those that need none."""
    return {
        name: objective
        for name, objective in OBJECTIVES.items()
        if weights.get(name, 0.0) != 0 and (with_teacher or not objective.needs_teacher)
    }


def paper_weight(objective: str, *, width: int = 512) -> float:
    """Return the weight that makes an objective count as in CLIP-KD's recipes, for a teacher of this `width`.

    The recipes use 1 for `task`, `crd`, `icl` and `afd`, 2000 for `fd` and `mfd`, 1e8 for `gd` at a batch of 1024, and
    no `cross_kd`.  Their FD and GD are means over the width, and GD also falls with the square of the batch size.  Here
    both are sums (see `fd_loss` and `gd_loss`), so 3.9 and 0.186 at D = 512 are right at any batch size.  GD's weight
    belongs to their inverted temperature (`reference_compat`): with the equation's, the term is far larger.
    """
    row = OBJECTIVES[objective]
    return row.paper_weight / width if row.is_mean_over_width else float(row.paper_weight)


def weights_on_unit_features(weights: Mapping[str, float], *, same_width: bool) -> dict[str, float]:
    """Return the weights for fine-tuning a student that provides only unit features of whole images.

    Objectives that fuse are dropped: newly initialized fusions would teach nothing.  A masked objective continues with
    the whole image.  If the widths differ, objectives in the teacher's width are dropped too, because the learnt
    projections start from raw features.  If no objective remains, the task loss is used.
    """
    kept = dict.fromkeys(OBJECTIVES, 0.0)
    for name, objective in select(weights).items():
        if not objective.fuses and (same_width or not objective.in_teacher_width):
            kept[objective.on_whole_image or name] += weights[name]
    return kept if any(kept.values()) else kept | {"task": 1.0}


class DistillationHeads(nn.Module):
    """The parameters that distillation adds to a student; they are not part of the saved student.

    Only parameters that the weighted objectives read exist, because data-parallel training refuses a parameter without
    a gradient.  For a student that trains without a teacher, pass no weight except the task's.

    `image_projection`, `text_projection`: Linear(D, E), for all objectives in the teacher's width if D and E differ.
    `image_fusion`, `text_fusion`: Linear(D + E, D), for AFD.
    `log_cross_logit_scale`, `log_fusion_logit_scale`: logarithms of the scales of ICL and cross-KD, and of AFD, from
    ln(1 / 0.07).

    `reference_compat` reproduces CLIP-KD's released code: the scale parameters are themselves the multipliers, 2.66
    instead of 14.3, and unbounded; GD divides by the scales; MFD masks nothing.
    """

    def __init__(
        self, student_width: int, teacher_width: int, weights: Mapping[str, float], *, reference_compat: bool = False
    ) -> None:
        super().__init__()
        assert set(weights) <= set(OBJECTIVES), f"unknown objectives: {sorted(set(weights) - set(OBJECTIVES))}"
        objectives = select(weights).values()
        self.reference_compat = reference_compat
        self._in_teacher_width = any(objective.in_teacher_width for objective in objectives)
        self._masks_image = any(objective.on_whole_image for objective in objectives)
        projects = self._in_teacher_width and student_width != teacher_width
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
            return log_scale
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
                    image_BE=_project(self.image_projection, raw_image_BD, features.image_BD),
                    text_BE=_project(self.text_projection, raw_text_BD, features.text_BD),
                )
            if self.reads_masked_image:
                raw_BD = widen(_require(raw_masked_image_BD))
                masked_BD = F.normalize(raw_BD, dim=-1)
                features = features._replace(masked_image_BE=_project(self.image_projection, raw_BD, masked_BD))
            elif self._masks_image:
                features = features._replace(masked_image_BE=features.image_BE)
            if self.image_fusion is not None and self.text_fusion is not None:
                features = features._replace(
                    fused_image_BD=_fuse(self.image_fusion, features.image_BD, teacher.image_BE),
                    fused_text_BD=_fuse(self.text_fusion, features.text_BD, teacher.text_BE),
                )
            return features


def _project(projection: nn.Linear | None, raw_BD: Tensor, unit_BD: Tensor) -> Tensor:
    return unit_BD if projection is None else F.normalize(projection(raw_BD), dim=-1)


def _fuse(fusion: nn.Linear, student_BD: Tensor, teacher_BE: Tensor) -> Tensor:
    return F.normalize(fusion(torch.cat([student_BD, teacher_BE.to(student_BD.dtype)], dim=-1)), dim=-1)


def weighted_loss(
    own: BatchFeatures,
    everyone: BatchFeatures,
    logit_scale: Tensor,
    heads: DistillationHeads,
    weights: Mapping[str, float],
    processes: Processes = ALONE,
    *,
    memory_mb: float = 256,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of the objectives, and the unweighted terms without gradient, in their order.

    `own` and `everyone` are the rank's features and those of all ranks (`gather_features`), from `heads`, which must
    have been made for at least these objectives; `logit_scale` is the student's multiplier.  Without a teacher, the
    objectives that need none are computed.  Sum and terms have the value of the whole batch on every rank (a collective
    call).  The gradient is that of the rank's rows as anchors: the mean over ranks is the gradient of the batch.
    """
    inputs = LossInputs(own, everyone, logit_scale, heads, processes, memory_mb)
    selected = select(weights, with_teacher=own.teacher is not None)
    with torch.autocast(logit_scale.device.type, enabled=False):
        parts, terms = _contrast_terms(inputs, selected, weights)
        for name, objective in selected.items():
            if not isinstance(objective.loss, Contrast):
                term = objective.loss(inputs)
                parts.append(weights[name] * term)
                terms[name] = term.detach()
    names = [name for name in OBJECTIVES if name in selected]
    values = processes.sum(torch.stack([terms[name] for name in names])) / processes.size
    total = torch.stack(parts).sum()
    whole = (values * values.new_tensor([weights[name] for name in names])).sum()
    return total + (whole - total).detach(), dict(zip(names, values.unbind(), strict=True))


def _contrast_terms(
    inputs: LossInputs, selected: Mapping[str, Objective], weights: Mapping[str, float]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the weighted parts and the terms of the objectives that share similarities: one sweep per direction."""
    parts, terms = [], {}
    for similarities in ("student", "cross", "fused"):
        named = {
            objective.loss.target: name
            for name, objective in selected.items()
            if isinstance(objective.loss, Contrast) and objective.loss.similarities == similarities
        }
        if not named:
            continue
        both = [weights[named[target]] / 2 if target in named else 0.0 for target in ("pair", "teacher")]
        teacher = inputs.teacher if "teacher" in named else (None, None)
        swept = [
            contrast(ours, theirs, (both[0], both[1]), inputs.rows)
            for ours, theirs in zip(getattr(inputs, similarities), teacher, strict=True)
        ]
        parts += [total for total, _, _ in swept]
        for place, target in enumerate(("pair", "teacher"), 1):
            if target in named:
                terms[named[target]] = (swept[0][place] + swept[1][place]) / 2
    return parts, terms


def _require(x: Tensor | None) -> Tensor:
    assert x is not None, "the heads were made without this objective, or were given no masked image"
    return x
