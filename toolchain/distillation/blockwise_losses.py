"""The losses of losses.py over the rows of one rank, in blocks: memory is linear in the batch, gradients are exact.

losses.py defines each loss for a whole batch.  This module computes the same numbers as training needs them:

- A sweep holds the similarities of one block of rows only (`sum_in_blocks`).
- A rank sums over its own b rows as anchors, with the B rows of all ranks as candidates.  The ranks share the work.
- Each function returns the mean over the rank's own rows.  The mean over ranks is the loss of the batch, and the mean
  over ranks of the gradients, which data-parallel training takes, is the gradient of that loss.

Arithmetic is that of losses.py: float32 or wider, also under autocast.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from toolchain.distillation.blocks import choose_block_rows, sum_in_blocks
from toolchain.distillation.losses import scaled_similarities, widen


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
    student: Similarities, teacher: Similarities | None, weights: tuple[float, float], rows: Rows
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted sum of two losses of one direction, and both losses without gradient.

        total = weights_0 CE + weights_1 KL
        CE = mean_i -log softmax(s a k^T)_i,i        (`clip_loss`, `icl_loss`, `afd_loss`)
        KL = mean_i KL(softmax(r V T^T)_i || softmax(s a k^T)_i)     (`crd_loss`, `cross_kd_loss`)

    The mean is over the rank's rows i.  A loss of weight 0 is not computed; KL needs `teacher`.
    """
    ce_weight, kl_weight = weights
    anchors, shared = [widen(student.anchor_bD)], [widen(student.candidate_BD), student.logit_scale]
    if teacher is not None and kl_weight:
        anchors += [widen(teacher.anchor_bD)]
        shared += [widen(teacher.candidate_BD), teacher.logit_scale]

    def sum_block(place: slice, block: Sequence[Tensor], whole: Sequence[Tensor]) -> Tensor:
        log_q_cB = scaled_similarities(block[0], whole[0], whole[1]).log_softmax(-1)
        ce = kl = log_q_cB.new_zeros(())
        if ce_weight:
            match_c1 = torch.arange(len(log_q_cB), device=log_q_cB.device)[:, None] + rows.first + place.start
            ce = -log_q_cB.gather(1, match_c1).sum()
        if kl_weight:
            log_p_cB = scaled_similarities(block[1], whole[2], whole[3]).log_softmax(-1)
            kl = F.kl_div(log_q_cB, log_p_cB, reduction="sum", log_target=True)
        return torch.stack([ce, kl])

    count = len(student.anchor_bD)
    total, (ce, kl) = sum_in_blocks(
        sum_block, (ce_weight / count, kl_weight / count), anchors, shared, _block_rows(student, rows)
    )
    return total, ce / count, kl / count


def match_gradients(
    student: tuple[Similarities, Similarities],
    teacher: tuple[Similarities, Similarities],
    rows: Rows,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return gradient distillation (`gd_loss`) over the rank's rows; both directions of the student and of the teacher.

    The loss is a mean of squares |g - G|^2 of gradients that are themselves sums over the batch.  One sweep forms g and
    G without their own derivatives.  A second sweep differentiates sum <R, g - G> with R = d loss / d g, which is the
    gradient of the loss.
    """
    value = torch.zeros((), dtype=torch.float64, device=student[0].anchor_bD.device)
    total = student[0].anchor_bD.new_zeros(())
    for ours, theirs in zip(student, teacher, strict=True):
        own = slice(rows.first, rows.first + len(ours.anchor_bD))
        with torch.no_grad():
            of_student = _closed_form_gradients(ours, rows, sum_over_ranks)
            of_teacher = _closed_form_gradients(theirs, rows, sum_over_ranks)
            anchors_bD, candidates_BD = (g - G for g, G in zip(of_student, of_teacher, strict=True))
            value += (anchors_bD.double().square().sum() + candidates_BD[own].double().square().sum()) / len(anchors_bD)
        for x, sign in ((ours, 2.0), (theirs, -2.0)):
            if any(part.requires_grad for part in x):
                total = total + _inner_product(x, sign * anchors_bD, sign * candidates_BD, rows)
    return total + (value.to(total.dtype) - total).detach()


def _closed_form_gradients(
    x: Similarities, rows: Rows, sum_over_ranks: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return B times the gradients of CE(s a k^T): of the rank's anchors [b, D], and of all candidates [B, D].

    of anchors: s (A k - k),   of candidates: s (A^T a - a),   A = softmax(s a k^T) over a row
    """
    anchor_bD, candidate_BD = widen(x.anchor_bD), widen(x.candidate_BD)
    of_anchors_bD, of_candidates_BD = torch.empty_like(anchor_bD), torch.zeros_like(candidate_BD)
    size = _block_rows(x, rows)
    for start in range(0, len(anchor_bD), size):
        block_cD = anchor_bD[start : start + size]
        probability_cB = scaled_similarities(block_cD, candidate_BD, x.logit_scale).softmax(-1)
        of_anchors_bD[start : start + size] = probability_cB @ candidate_BD
        of_candidates_BD += probability_cB.T @ block_cD
    own = slice(rows.first, rows.first + len(anchor_bD))
    of_anchors_bD -= candidate_BD[own]
    of_candidates_BD[own] -= anchor_bD
    return x.logit_scale * of_anchors_bD, x.logit_scale * sum_over_ranks(of_candidates_BD)


def _inner_product(x: Similarities, on_anchors_bD: Tensor, on_candidates_BD: Tensor, rows: Rows) -> Tensor:
    """Return the mean over the rank's rows of <R, g>, differentiable in the features; R is constant.

    Row i adds  s < R_i, (A k)_i - k_i >  and, of the gradient of the candidates,  s < (A R')_i - R'_i, a_i >.
    """
    count = len(x.anchor_bD)

    def sum_block(place: slice, block: Sequence[Tensor], whole: Sequence[Tensor]) -> Tensor:
        anchor_cD, on_anchor_cD = block
        candidate_BD, logit_scale, on_candidate_BD = whole
        own = slice(rows.first + place.start, rows.first + place.start + len(anchor_cD))
        probability_cB = scaled_similarities(anchor_cD, candidate_BD, logit_scale).softmax(-1)
        of_anchors = (on_anchor_cD * (probability_cB @ candidate_BD - candidate_BD[own])).sum()
        of_candidates = ((probability_cB @ on_candidate_BD - on_candidate_BD[own]) * anchor_cD).sum()
        return (logit_scale * (of_anchors + of_candidates)).reshape(1)

    anchor_bD, candidate_BD = widen(x.anchor_bD), widen(x.candidate_BD)
    block_rows = _block_rows(x, rows)
    shared = [candidate_BD, x.logit_scale, on_candidates_BD]
    return sum_in_blocks(sum_block, (1 / count,), [anchor_bD, on_anchors_bD], shared, block_rows)[0]


def _block_rows(x: Similarities, rows: Rows) -> int:
    return choose_block_rows(len(x.candidate_BD), rows.memory_mb, widen(x.anchor_bD).dtype)
