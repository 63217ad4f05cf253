"""The losses of losses.py over the rows of one rank, in blocks: memory is linear in the batch, gradients are exact.

losses.py defines each loss for a whole batch.  This module computes the same numbers as training needs them:

- A sweep holds the similarities of one block of rows only (blocks.py).  Losses of the same similarities share it.
- A rank sums over its own b rows as anchors, with the B rows of all ranks as candidates.  The ranks share the work.
- Each loss is the mean over the rank's own rows.  The mean over ranks is the loss of the batch, and the mean
  over ranks of the gradients, which data-parallel training takes, is the gradient of that loss.

Arithmetic is that of losses.py: float32 or wider, also under autocast.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from toolchain.distillation.blocks import Sweep, choose_block_rows
from toolchain.distillation.losses import fd_loss, scaled_similarities, widen


class Similarities(NamedTuple):
    """Logits [b, B] of a rank's anchors and all candidates, still as features: s a k^T."""

    anchor_bD: Tensor
    candidate_BD: Tensor
    logit_scale: Tensor


class Rows(NamedTuple):
    """The rows of a batch that a rank sums over, and the memory that it may use."""

    first: int
    """Number of the rank's first row in the batch: its match among the candidates."""

    memory_mb: float


def contrast(
    student: Similarities, teacher: Similarities | None, names: tuple[str | None, str | None], rows: Rows
) -> Sweep:
    """Return the sweep that adds one direction of two losses to the terms of these names; None: not computed.

        CE / 2,   CE = mean_i -log softmax(s a k^T)_i,i       (`clip_loss`, `icl_loss`, `afd_loss`)
        KL / 2,   KL = mean_i KL(softmax(r V T^T)_i || softmax(s a k^T)_i)      (`crd_loss`, `cross_kd_loss`)

    The mean is over the rank's rows i.  KL needs `teacher`.
    """
    count = len(student.anchor_bD)
    anchors, shared = [widen(student.anchor_bD)], [widen(student.candidate_BD), student.logit_scale]
    if names[1] is not None and teacher is not None:
        anchors += [widen(teacher.anchor_bD)]
        shared += [widen(teacher.candidate_BD), teacher.logit_scale]

    def sum_block(place: slice, block: Sequence[Tensor], whole: Sequence[Tensor]) -> Tensor:
        log_q_cB = scaled_similarities(block[0], whole[0], whole[1]).log_softmax(-1)
        added = []
        if names[0] is not None:
            match_c1 = torch.arange(len(log_q_cB), device=log_q_cB.device)[:, None] + rows.first + place.start
            added.append(-log_q_cB.gather(1, match_c1).sum())
        if names[1] is not None:
            log_p_cB = scaled_similarities(block[1], whole[2], whole[3]).log_softmax(-1)
            added.append(F.kl_div(log_q_cB, log_p_cB, reduction="sum", log_target=True))
        return torch.stack(added) / (2 * count)

    terms = tuple(name for name in names if name is not None)
    return Sweep(terms, sum_block, anchors, shared, len(student.candidate_BD))


def match_features(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], name: str) -> Sweep:
    """Return the sweep that adds `fd_loss`, of image and text features in the teacher's width, to a term."""
    count, width = student[0].shape

    def sum_block(_: slice, block: Sequence[Tensor], __: Sequence[Tensor]) -> Tensor:
        return fd_loss(*block).reshape(1) * (len(block[0]) / count)

    return Sweep((name,), sum_block, [*map(widen, student), *map(widen, teacher)], [], 2 * width)


def match_gradients(
    student: tuple[Similarities, Similarities],
    teacher: tuple[Similarities, Similarities],
    name: str,
    rows: Rows,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> tuple[list[Sweep], Tensor]:
    """Return sweeps with the gradient of `gd_loss`, and its value; both directions of the student and of the teacher.

    The loss is a mean of squares |g - G|^2 of gradients that are themselves sums over the batch.  A first sweep, here,
    forms g and G without their own derivatives.  The sweeps that are returned sum <R, g - G> with R = d loss / d g,
    whose gradient is that of the loss.
    """
    value = torch.zeros((), dtype=torch.float64, device=student[0].anchor_bD.device)
    sweeps = []
    for ours, theirs in zip(student, teacher, strict=True):
        count = len(ours.anchor_bD)
        with torch.no_grad():
            of_student = _closed_form_gradients(ours, rows, sum_over_ranks)
            of_teacher = _closed_form_gradients(theirs, rows, sum_over_ranks)
            anchors_bD, candidates_BD = (g - G for g, G in zip(of_student, of_teacher, strict=True))
            for part_bD in (anchors_bD, candidates_BD[rows.first : rows.first + count]):
                value += part_bD.double().square().sum() / count
        for x, sign in ((ours, 2 / count), (theirs, -2 / count)):
            if any(part.requires_grad for part in x):
                sweeps.append(_inner_product(x, sign * anchors_bD, sign * candidates_BD, name, rows))
    return sweeps, value.to(anchors_bD.dtype)


def _closed_form_gradients(
    x: Similarities, rows: Rows, sum_over_ranks: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return B times the gradients of CE(s a k^T): of the rank's anchors [b, D], and of all candidates [B, D].

    of anchors: s (A k - k),   of candidates: s (A^T a - a),   A = softmax(s a k^T) over a row
    """
    anchor_bD, candidate_BD = widen(x.anchor_bD), widen(x.candidate_BD)
    of_anchors_bD, of_candidates_BD = torch.empty_like(anchor_bD), torch.zeros_like(candidate_BD)
    size = choose_block_rows(len(candidate_BD), rows.memory_mb, candidate_BD.dtype)
    for start in range(0, len(anchor_bD), size):
        block_cD = anchor_bD[start : start + size]
        probability_cB = scaled_similarities(block_cD, candidate_BD, x.logit_scale).softmax(-1)
        of_anchors_bD[start : start + size] = probability_cB @ candidate_BD
        of_candidates_BD += probability_cB.T @ block_cD
    own = slice(rows.first, rows.first + len(anchor_bD))
    of_anchors_bD -= candidate_BD[own]
    of_candidates_BD[own] -= anchor_bD
    return x.logit_scale * of_anchors_bD, x.logit_scale * sum_over_ranks(of_candidates_BD)


def _inner_product(x: Similarities, on_anchors_bD: Tensor, on_candidates_BD: Tensor, name: str, rows: Rows) -> Sweep:
    """Return the sweep that adds <R, g> to a term; R is constant.

    Row i adds  s < R_i, (A k)_i - k_i >  and, of the gradient of the candidates,  s < (A R')_i - R'_i, a_i >.
    """

    def sum_block(place: slice, block: Sequence[Tensor], whole: Sequence[Tensor]) -> Tensor:
        anchor_cD, on_anchor_cD = block
        candidate_BD, logit_scale, on_candidate_BD = whole
        own = slice(rows.first + place.start, rows.first + place.start + len(anchor_cD))
        probability_cB = scaled_similarities(anchor_cD, candidate_BD, logit_scale).softmax(-1)
        of_anchors = (on_anchor_cD * (probability_cB @ candidate_BD - candidate_BD[own])).sum()
        of_candidates = ((probability_cB @ on_candidate_BD - on_candidate_BD[own]) * anchor_cD).sum()
        return (logit_scale * (of_anchors + of_candidates)).reshape(1)

    shared = [widen(x.candidate_BD), x.logit_scale, on_candidates_BD]
    return Sweep((name,), sum_block, [widen(x.anchor_bD), on_anchors_bD], shared, len(x.candidate_BD))
