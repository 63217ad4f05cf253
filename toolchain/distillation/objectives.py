"""The objectives in one table, and their weighted sum; those of CLIP-KD (arXiv:2307.12732) come first.

A batch passes `DistillationHeads` (heads.py) -> `BatchFeatures` -> `gather_features` over the ranks (features.py) ->
`weighted_loss`.  An objective whose weight is 0 costs nothing: its features are not computed, its parameters do not
exist and its loss is not computed.

To add an objective, write its definition in losses.py, a row in `OBJECTIVES` that says how to compute it in blocks, and
its weight in recipe/distill.py, which also lists the objectives that need pairs of image and caption.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from toolchain.distillation.blocks import Sweep, scale_terms, sum_in_blocks
from toolchain.distillation.blockwise_losses import (
    PairLogits,
    Rows,
    Similarities,
    Target,
    contrast,
    decide_pairs,
    match_features,
    match_gradients,
)
from toolchain.distillation.features import BatchFeatures, Scales, split_teachers
from toolchain.distributed import ALONE, Processes
from toolchain.recipe.distill import AFFINITY_LOGIT_SCALE


@dataclass(frozen=True)
class LossInputs:
    """The features of one batch, the scales and the settings that a loss may read.

    Reading features that the heads did not make raises AssertionError.
    """

    own: BatchFeatures
    """The features of the rank's own b rows: the anchors of its losses."""

    everyone: BatchFeatures
    """The features of the B rows of all ranks: the candidates."""

    scales: Scales
    processes: Processes
    memory_mb: float
    """Memory for a block of rows (blocks.py)."""

    divides_by_scales: bool
    """True if gradient distillation divides by the scales instead of multiplying, as the released code does."""

    affinity_logit_scale: float

    @property
    def rows(self) -> Rows:
        """Return the place of the rank's rows in the batch."""
        return Rows(self.processes.rank * len(self.own.student.image_BD), self.processes, self.memory_mb)

    @property
    def student(self) -> tuple[Similarities, Similarities]:
        """Image to text and text to image, in the student's own width."""
        own, everyone = self.own.student, self.everyone.student
        return _both_directions(
            (own.image_BD, own.text_BD), (everyone.image_BD, everyone.text_BD), self.scales.logit_scale
        )

    @property
    def affinity(self) -> tuple[Similarities, Similarities]:
        """Like `student`, with the constant scale of affinity mimicking."""
        return self._rescale(self.student)

    @property
    def teacher_affinity(self) -> tuple[Similarities, Similarities]:
        """Like `teacher`, with the constant scale of affinity mimicking."""
        return self._rescale(self.teacher)

    def _rescale(self, both: tuple[Similarities, Similarities]) -> tuple[Similarities, Similarities]:
        scale = torch.full_like(self.scales.logit_scale, self.affinity_logit_scale)
        return both[0]._replace(logit_scale=scale), both[1]._replace(logit_scale=scale)

    @property
    def cross(self) -> tuple[Similarities, Similarities]:
        """The student's images to the teacher's texts, and texts to the teacher's images, in the teacher's width."""
        return _both_directions(self.projected, _teacher_pair(self.everyone), _require(self.scales.cross_logit_scale))

    @property
    def fused(self) -> tuple[Similarities, Similarities]:
        """Images fused from both models to fused texts, and the reverse."""
        own, everyone = (
            (_require(x.student.fused_image_BD), _require(x.student.fused_text_BD)) for x in (self.own, self.everyone)
        )
        return _both_directions(own, everyone, _require(self.scales.fusion_logit_scale))

    @property
    def teacher(self) -> tuple[Similarities, Similarities]:
        """The teacher's image to text and text to image."""
        return _both_directions(_teacher_pair(self.own), _teacher_pair(self.everyone), self.teacher_logit_scale)

    @property
    def student_pairs(self) -> PairLogits:
        """The logits of a sigmoid student, image to text; text to image has the same."""
        return PairLogits(self.student[0], _require(self.scales.logit_bias))

    @property
    def teacher_pairs(self) -> PairLogits:
        """The logits of a sigmoid teacher, image to text."""
        assert self.own.teacher is not None
        assert self.own.teacher.logit_bias is not None, "sigmoid_kd needs a sigmoid teacher"
        return PairLogits(self.teacher[0], self.own.teacher.logit_bias)

    @property
    def projected(self) -> tuple[Tensor, Tensor]:
        """The rank's image and text features in the teacher's width."""
        return _require(self.own.student.image_BE), _require(self.own.student.text_BE)

    @property
    def masked(self) -> tuple[Tensor, Tensor]:
        """Like `projected`, but the student saw only some patches of the image."""
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
    """Return the similarities of (image, text) features: own images to everyone's texts, own texts to their images."""
    return Similarities(own[0], everyone[1], logit_scale), Similarities(own[1], everyone[0], logit_scale)


def _teacher_pair(features: BatchFeatures) -> tuple[Tensor, Tensor]:
    assert features.teacher is not None
    return features.teacher.image_BE, features.teacher.text_BE


def _match_gradients(x: LossInputs, name: str) -> tuple[list[Sweep], Tensor]:
    """Return the sweeps and the value of gradient distillation."""
    everyone = x.everyone.student
    scales = x.scales.logit_scale, x.teacher_logit_scale
    if x.divides_by_scales:
        scales = 1 / scales[0], 1 / scales[1]
    return match_gradients(
        _both_directions(x.projected, (_require(everyone.image_BE), _require(everyone.text_BE)), scales[0]),
        _both_directions(x.targets, _teacher_pair(x.everyone), scales[1]),
        name,
        x.rows,
    )


@dataclass(frozen=True)
class Contrast:
    """A loss that compares each anchor with all candidates; losses of the same similarities share their sweep."""

    similarities: Literal["student", "affinity", "cross", "fused"]
    """The property of `LossInputs` with both directions."""

    target: Target


@dataclass(frozen=True)
class Pairs:
    """A loss that decides of each anchor and candidate whether they are a pair; such losses share their sweep."""

    target: Target
    """pair: 1 for a pair and 0 for others; teacher: the teacher's sigmoid."""


Loss = Contrast | Pairs | Callable[[LossInputs, str], list[Sweep] | tuple[list[Sweep], Tensor]]


@dataclass(frozen=True)
class Objective:
    """One objective: its loss, and the inputs that the loss reads."""

    loss: Loss
    """The way to compute the loss over the rank's rows; losses.py defines it.  A function is given the objective's name
    and returns sweeps, or sweeps that have only the loss's gradient together with its value."""

    paper_weight: float
    """The weight in its paper's recipes, 0 if they do not use the objective; `paper_weight` converts it to our
    units."""

    loss_of_sigmoids: Pairs | None = None
    """The loss for a sigmoid student, if it is another one."""

    is_mean_over_width: bool = False
    """True if the paper's term is a mean over the width where ours is a sum, so its weight is divided by the width."""

    needs_teacher: bool = True
    in_teacher_width: bool = False
    """True if it reads features in the teacher's width; a projection computes them if the widths differ."""

    reads_logit_scale: bool = False
    """True if it reads, and so trains, the student's own scale."""

    reads_logit_bias: bool = False
    """True if it reads, and so trains, the bias of a sigmoid student."""

    reads_cross_scale: bool = False
    """True if it needs the learnt scale of similarities between the two models."""

    fuses: bool = False
    """True if it needs learnt fusions of both models' features, and a scale for them."""

    on_whole_image: str | None = None
    """For an objective on masked images: the name of the objective that has the same loss on whole images."""

    @property
    def is_mean_over_teachers(self) -> bool:
        """Return True if it compares the student with each teacher; a fusion is one of all."""
        return self.needs_teacher and not self.fuses


OBJECTIVES: dict[str, Objective] = {
    "task": Objective(
        Contrast("student", "pair"),
        paper_weight=1,
        loss_of_sigmoids=Pairs("pair"),
        needs_teacher=False,
        reads_logit_scale=True,
        reads_logit_bias=True,
    ),
    "crd": Objective(
        Contrast("student", "teacher"),
        paper_weight=1,
        reads_logit_scale=True,
    ),
    "fd": Objective(
        lambda x, name: [match_features(x.projected, x.targets, name)],
        paper_weight=2000,
        is_mean_over_width=True,
        in_teacher_width=True,
    ),
    "mfd": Objective(
        lambda x, name: [match_features(x.masked, x.targets, name)],
        paper_weight=2000,
        is_mean_over_width=True,
        in_teacher_width=True,
        on_whole_image="fd",
    ),
    "gd": Objective(
        _match_gradients,
        paper_weight=1e8 / 1024**2,  # the paper's term is ours divided by the square of its batch, 1024, and the width
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
    "affinity": Objective(
        Contrast("affinity", "affinity"),
        paper_weight=1,
    ),
    "sigmoid_kd": Objective(
        Pairs("teacher"),
        paper_weight=0,
        reads_logit_scale=True,
        reads_logit_bias=True,
    ),
}
"""The objectives, in the order in which they are summed and logged."""


def select(weights: Mapping[str, float], *, with_teacher: bool = True) -> dict[str, Objective]:
    """Return the objectives of nonzero weight in the order of `OBJECTIVES`; without a teacher, those that need none."""
    return {
        name: objective
        for name, objective in OBJECTIVES.items()
        if weights.get(name, 0.0) != 0 and (with_teacher or not objective.needs_teacher)
    }


def paper_weight(objective: str, *, width: int = 512) -> float:
    """Return the weight that makes an objective count as in CLIP-KD's recipes, for a teacher of this `width`.

    The recipes use 1 for `task`, `crd`, `icl` and `afd`, 2000 for `fd` and `mfd`, 1e8 for `gd` at a batch of 1024, and
    no `cross_kd`.  Their FD, MFD and GD are means over the width, and GD is also divided by the squared batch size.
    Ours are sums over the width (see `fd_loss` and `gd_loss`), so at D = 512 the weights are 3.9 and 0.186 at any batch
    size.  GD's weight is meant for `reference_compat`, which divides by the scales.  Without it, the scales multiply,
    and the term is far larger.
    """
    row = OBJECTIVES[objective]
    return row.paper_weight / width if row.is_mean_over_width else float(row.paper_weight)


def weights_on_unit_features(
    weights: Mapping[str, float], *, same_space: bool, has_captions: bool = True
) -> dict[str, float]:
    """Return the weights for fine-tuning a student that provides only unit features of whole images.

    Objectives that fuse are dropped, because their fusions would be newly initialized.  The weight of a masked
    objective goes to its objective on whole images.  If learnt projections compared the student with its teacher,
    objectives in the teacher's width are dropped too, because the projections need features that are not normalized.
    If no objective remains, `task` has weight 1, or without captions `crd`.
    """
    kept = dict.fromkeys(OBJECTIVES, 0.0)
    for name, objective in select(weights).items():
        if not objective.fuses and (same_space or not objective.in_teacher_width):
            kept[objective.on_whole_image or name] += weights[name]
    return kept if any(kept.values()) else kept | {"task" if has_captions else "crd": 1.0}


def weighted_loss(
    own: BatchFeatures,
    everyone: BatchFeatures,
    scales: Scales,
    weights: Mapping[str, float],
    processes: Processes = ALONE,
    *,
    memory_mb: float = 128,
    divides_by_scales: bool = False,
    affinity_logit_scale: float = AFFINITY_LOGIT_SCALE,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of the objectives, and the unweighted terms without gradient, in their order.

    `own` and `everyone` are the features of the rank's rows and of all ranks' rows (`gather_features`), made with
    `scales` by heads for at least these objectives.  Without a teacher, only objectives that need none are computed.
    `memory_mb` bounds the memory of a block (blocks.py).  `divides_by_scales` selects `reference_compat`'s form of
    gradient distillation.  If `scales` has a bias, the student is a sigmoid model.  An objective that compares the
    student with a teacher is the mean over the teachers, if there are several.

    On every rank, the sum and the terms have the values of the whole batch (a collective call).  The sum's gradient
    differs: it is that through the similarities of the rank's rows; the mean over ranks is that of the batch's loss.
    """
    inputs = LossInputs(own, everyone, scales, processes, memory_mb, divides_by_scales, affinity_logit_scale)
    selected = select(weights, with_teacher=own.teacher is not None)
    with torch.autocast(scales.logit_scale.device.type, enabled=False):
        sweeps, values = _compute_losses(inputs, selected)
        total, terms = (
            sum_in_blocks(sweeps, weights, memory_mb) if sweeps else (torch.zeros_like(scales.logit_scale), {})
        )
    terms |= values
    value_n = processes.sum(torch.stack([terms[name] for name in selected])) / processes.size
    terms = dict(zip(selected, value_n.unbind(), strict=True))
    value = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    return total + (value - total).detach(), terms


def _compute_losses(inputs: LossInputs, selected: Mapping[str, Objective]) -> tuple[list[Sweep], dict[str, Tensor]]:
    """Return the sweeps of all objectives, and the values of those whose sweeps have only their gradient.

    For several teachers, the mean over them of KL(p_t || q) has the gradient of KL(mean_t p_t || q): in the logits it
    is q - mean_t p_t.  So relations are averaged after the softmax.
    """
    losses = {name: _choose_loss(objective, inputs.scales) for name, objective in selected.items()}
    of_teachers = list(zip(split_teachers(inputs.own), split_teachers(inputs.everyone), strict=True))
    shares = {name: 1 / len(of_teachers) for name, objective in selected.items() if objective.is_mean_over_teachers}
    sweeps: list[Sweep] = []
    values: dict[str, Tensor] = {}
    for number, (own, everyone) in enumerate(of_teachers):
        asked = {name: loss for name, loss in losses.items() if name in shares or number == 0}
        of_teacher = replace(inputs, own=own, everyone=everyone)
        made = _contrasts(of_teacher, asked) + _pairs(of_teacher, asked)
        for name, loss in asked.items():
            if not isinstance(loss, Contrast | Pairs):
                found = loss(of_teacher, name)
                if isinstance(found, tuple):
                    found, value = found
                    values[name] = values.get(name, torch.zeros_like(value)) + shares[name] * value
                made += found
        sweeps += made if len(of_teachers) == 1 else [scale_terms(sweep, shares) for sweep in made]
    return sweeps, values


def _choose_loss(objective: Objective, scales: Scales) -> Loss:
    """Return an objective's loss for this student: a softmax model, or a sigmoid model, which has a bias."""
    if scales.logit_bias is not None and objective.loss_of_sigmoids is not None:
        return objective.loss_of_sigmoids
    return objective.loss


def _contrasts(inputs: LossInputs, losses: Mapping[str, Loss]) -> list[Sweep]:
    """Return the sweeps of all contrastive objectives, one for each kind of similarities that some of them compare."""
    sweeps = []
    for similarities in ("student", "affinity", "cross", "fused"):
        names: dict[Target, str] = {
            loss.target: name
            for name, loss in losses.items()
            if isinstance(loss, Contrast) and loss.similarities == similarities
        }
        if not names:
            continue
        student, teacher = getattr(inputs, similarities), inputs.teacher if "teacher" in names else (None, None)
        if similarities == "affinity":
            teacher = inputs.teacher_affinity
        if similarities == "cross":
            sweeps += [
                contrast(ours, theirs, names, inputs.rows, both_directions=False)
                for ours, theirs in zip(student, teacher, strict=True)
            ]
        else:  # the logits of text to image are those of image to text, transposed
            sweeps.append(contrast(student[0], teacher[0], names, inputs.rows, both_directions=True))
    return sweeps


def _pairs(inputs: LossInputs, losses: Mapping[str, Loss]) -> list[Sweep]:
    """Return the sweep of all objectives that decide of pairs, if there are any."""
    names: dict[Target, str] = {loss.target: name for name, loss in losses.items() if isinstance(loss, Pairs)}
    if not names:
        return []
    teacher = inputs.teacher_pairs if "teacher" in names else None
    return [decide_pairs(inputs.student_pairs, teacher, names, inputs.rows)]


def _require(x: Tensor | None) -> Tensor:
    assert x is not None, "the heads were made without this objective, or were given no masked image"
    return x
